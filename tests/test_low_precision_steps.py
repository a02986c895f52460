"""Steps in low precision: of any shape and layout, on replicas, moved, skipped, scaled."""

import copy
import logging
from unittest.mock import Mock

import pytest
import torch
from common import NATIVE, Target, parameters, randn, unchanged_since
from common import snapshot as copies_of
from hypothesis import given, settings
from hypothesis import strategies as st
from low_precision import (
    BF16,
    CODES,
    F32,
    SCHEMES,
    assert_in_kernels,
    assert_same_state,
    give_rounded_grads,
    model,
    run,
    same_bits,
    schemes,
)

from fused_adamw.fields import Rounding
from fused_adamw.formats import FORMATS, Field, element_index, noise_bits, noise_hash, noise_word
from fused_adamw.step.members import Kind
from fused_adamw.step.snapshot import Forms

REFERENCE = Target("reference", "cpu")


# ---- Every shape and layout


@st.composite
def layouts(draw):
    """A parameter of any strides, large enough for codes or not."""
    rows = draw(st.sampled_from([1, 2, 5, 33, 64]))
    inner = draw(st.lists(st.sampled_from([1, 2, 3, 7, 32, 43, 130]), max_size=3))
    shape = [rows, *inner, draw(st.sampled_from([1, 8, 100, 128, 300]))]
    if torch.Size(shape).numel() > 40_000:
        shape = shape[:1] + shape[-1:]
    order = draw(st.permutations(range(len(shape))))
    if draw(st.booleans()):
        order = [0, *(dim for dim in order if dim)]
    whole = randn(*(shape[dim] for dim in order), seed=draw(st.integers(0, 9)), dtype=BF16)
    t = whole.permute([order.index(dim) for dim in range(len(shape))])
    return t[:, :, ::2] if t.dim() > 2 and draw(st.booleans()) else t


@settings(max_examples=60, deadline=None)
@given(
    st.lists(layouts(), min_size=1, max_size=3),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.sampled_from([BF16, F32]),
)
def test_kernels_keep_what_the_reference_keeps(tensors, scheme, seed, amsgrad, grad_dtype):
    """Moments and counts bit for bit; parameters, which the reference rounds otherwise on the way, nearly."""
    held, options = [], SCHEMES[scheme] | {"amsgrad": amsgrad and "8bit" not in scheme}
    for target in (NATIVE, REFERENCE):
        params = [torch.nn.Parameter(t.detach().clone(memory_format=torch.preserve_format)) for t in tensors]
        for p, t in zip(params, tensors, strict=True):
            p.data = torch.empty_strided(t.shape, t.stride(), dtype=BF16).copy_(t)
            if grad_dtype != BF16 and hasattr(p, "grad_dtype"):
                p.grad_dtype = grad_dtype
        optimizer = target.adamw(params, lr=1e-3, seed=seed, **options)
        run(params, optimizer, 2)
        held.append((params, optimizer))
    for p, q in zip(held[0][0], held[1][0], strict=True):
        ours, theirs = (optimizer.state[x] for (_, optimizer), x in zip(held, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"master_residual"}:
            assert same_bits(ours[key], theirs[key]), key
        assert all(ours[key].stride() == theirs[key].stride() for key in ours)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2**-7, atol=1e-6)


# ---- One step, in the words of its definition


def test_a_step_loads_computes_and_stores(target):
    """Noise from the seed, the slot, the count and the element; moments from the float32 rule."""
    params, optimizer = model(target, state_dtype="8bit", seed=2**63 + 5)
    run(params, optimizer, 2)
    before = [copy.deepcopy(optimizer.state[p]) for p in params]
    give_rounded_grads(params, 2)
    grads = [p.grad.detach().float() for p in params]
    norm = torch.stack([g.double().norm() for g in grads]).norm()
    scale = float((1.0 / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    for slot, (p, old, g) in enumerate(zip(params, before, grads, strict=True)):
        h = noise_hash(noise_word(2**63 + 5, slot), torch.tensor(3.0, device=p.device), element_index(p))
        state, g = optimizer.state[p], g * torch.tensor(scale, dtype=F32, device=p.device)
        if CODES[0] not in state:
            v = old["exp_avg_sq"].float() * 0.999 + (1 - 0.999) * g * g
            expected, _ = FORMATS["bfloat16_stochastic"].store(v, noise_bits(h, "exp_avg_sq"), p)
            assert same_bits(state["exp_avg_sq"], expected)
            continue
        m = Field(FORMATS["root_signed"], *(old[key] for key in CODES[:2])).load()
        v = Field(FORMATS["root_unsigned"], *(old[key] for key in CODES[2:])).load()
        m, v = m + (1 - 0.9) * (g - m), v * 0.999 + (1 - 0.999) * g * g
        for keys, name, x, format in (
            (CODES[:2], "exp_avg", m, "root_signed"),
            (CODES[2:], "exp_avg_sq", v, "root_unsigned"),
        ):
            expected = FORMATS[format].store(x, noise_bits(h, name), p)
            for key, value in zip(keys, expected, strict=True):
                assert same_bits(state[key], value), (slot, key)


def test_seeds_give_other_roundings(target):
    runs = []
    for seed in (0, 1, 0):
        params, optimizer = model(target, stochastic_rounding=True, state_dtype="8bit", seed=seed)
        run(params, optimizer, 2)
        runs.append((params, optimizer))
    assert_same_state(runs[0][1], runs[2][1])
    a, b = runs[0], runs[1]
    assert not a[0][0].equal(b[0][0])
    assert not a[1].state[a[0][0]]["exp_avg_code"].equal(b[1].state[b[0][0]]["exp_avg_code"])


# ---- The same bits


@schemes
def test_replicas_stay_equal(target, options, threads):
    """Elsewhere in memory, and with other threads."""
    params, optimizer = model(target, **options)
    copies, other = model(target, **options)
    for step in range(5 if target.slow else 30 if target.backend == "reference" else 100):
        threads(1)
        run(params, optimizer, 1, first=step)
        threads(2)
        for p in copies:
            p.data = p.data.clone()
        run(copies, other, 1, first=step)
    assert_same_state(optimizer, other)


@schemes
def test_a_group_that_is_added_changes_nothing_of_the_others(target, options):
    params, optimizer = model(target, **options)
    optimizer.max_grad_norm = None  # the norm is of all
    copies, other = model(target, **options)
    other.max_grad_norm = None
    run(params, optimizer, 2)
    run(copies, other, 2)
    more = parameters([(64, 70), (3,)], seed=9, dtype=BF16, device=target.device)
    other.add_param_group({"params": more})
    run(params, optimizer, 2, first=2)
    give_rounded_grads([*more], 3)
    run(copies, other, 2, first=2)
    for p, q in zip(params, copies, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert all(same_bits(value, other.state[q][key]) for key, value in optimizer.state[p].items())
    assert all(other.state[p]["step"] == 2 for p in more)
    run([*copies, *more], other, 1, first=4)


@schemes
def test_loading_by_name_keeps_every_bit(target, options):
    net = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.LayerNorm(64)).to(target.device, BF16)
    before = torch.optim.AdamW(net.named_parameters())  # only its groups are wanted: one of all
    ours = target.adamw(before.param_groups[0]["params"], **options)
    run(list(net.parameters()), ours, 2)
    regrouped = target.adamw(net, **options)
    regrouped.load_state_dict_by_name(ours.state_dict(), net.named_parameters())
    for p in net.parameters():
        for key, value in ours.state[p].items():
            assert same_bits(value, regrouped.state[p][key])


# ---- Moved and shared


@schemes
def test_state_that_was_moved_is_followed(target, options):
    """As by offloading and bringing back: rows are rewritten, sides too, and the plan stays."""
    params, optimizer = model(target, **options)
    copies, other = model(target, **options)
    run(params, optimizer, 2)
    run(copies, other, 2)
    plan = other._plan
    kept = []  # the old memory is not given to anybody else, and not read
    for p in copies:
        for key, value in other.state[p].items():
            kept.append(value)
            other.state[p][key] = value.clone()
            value.fill_(1)
        kept.append(p.data)
        p.data = p.data.clone()
        kept[-1].fill_(1)
    run(params, optimizer, 2, first=2)
    run(copies, other, 2, first=2)
    assert other._plan is plan
    assert_same_state(optimizer, other)
    assert all((value == 1).all() for value in kept)


@pytest.mark.parametrize("key", [*CODES, "master_residual"])
def test_a_side_that_is_shared_is_left_to_the_reference(key, caplog):
    """Kernels would write it twice at the same time."""
    params = parameters([(40, 130)] * 2, dtype=BF16)
    optimizer = NATIVE.adamw(params, master_weights="split", state_dtype="8bit")
    run(params, optimizer, 1)
    assert_in_kernels(NATIVE, optimizer)
    optimizer.state[params[0]][key] = optimizer.state[params[1]][key]
    with caplog.at_level(logging.DEBUG, logger="fused_adamw"):
        run(params, optimizer, 1)
    assert f"{key} shares memory with another one" in caplog.text


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        ("master_residual", lambda t: t.t().contiguous().t(), "master_residual has strides"),
        ("exp_avg_code", lambda t: t.t().contiguous().t(), "exp_avg_code has strides"),
        ("exp_avg_sq_scale", lambda t: t.t().contiguous().t(), "exp_avg_sq_scale is not contiguous"),
        ("exp_avg_scale", lambda t: torch.stack([t, t], -1)[..., 0], "exp_avg_scale is not dense"),
    ],
)
def test_what_lies_otherwise_is_left_to_the_reference(key, change, reason, caplog):
    held = []
    for _ in range(2):
        p = parameters([(40, 256)], dtype=BF16)[0]
        optimizer = NATIVE.adamw([p], master_weights="split", state_dtype="8bit")
        run([p], optimizer, 1)
        held.append((p, optimizer))
    (p, optimizer), (q, other) = held
    optimizer.state[p][key] = change(optimizer.state[p][key])
    with caplog.at_level(logging.DEBUG, logger="fused_adamw"):
        run([p], optimizer, 1, first=1)
    run([q], other, 1, first=1)
    assert f"is stepped by the reference: {reason}" in caplog.text
    assert_in_kernels(NATIVE, other)
    if key != "exp_avg_code":  # blocks follow the layout of codes
        for name in CODES:
            assert optimizer.state[p][name].equal(other.state[q][name]), name


def test_rows_too_long_for_a_table_are_left_to_the_reference():
    """32 bits of a row of the table tell how long they are."""
    backend = Mock(supports=lambda device, formats: True)
    for columns, expected in ((2**32 - 1, None), (2**32, "its rows have 4,294,967,296 values")):
        p = torch.empty(2, columns, dtype=BF16, device="meta")
        tensors = {"parameter": p, "gradient": p, "step": torch.empty((), device="meta")}
        for name in CODES[::2]:
            format = FORMATS["root_unsigned" if "sq" in name else "root_signed"]
            tensors[name] = torch.empty_like(p, dtype=format.dtype)
            scales = torch.empty(format.side_shape(p.shape), device="meta")
            tensors[name.replace("code", "scale")] = scales
        kind = Kind.of({name: Forms()(t) for name, t in tensors.items()}, Rounding(), backend)
        assert kind.window == (0, columns, columns)
        assert (kind.fallback, kind.in_rows is not None) == (expected, expected is None)


# ---- NaN, infinity, loss scales


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_a_bad_gradient_is_nan_and_its_neighbours_are_not(target, bad):
    p = parameters([(40, 300)], dtype=BF16, device=target.device)[0]
    optimizer = target.adamw([p], state_dtype="8bit", stochastic_rounding=True)
    run([p], optimizer, 1)
    give_rounded_grads([p], 1)
    p.grad[3, 140] = bad
    optimizer.step()
    give_rounded_grads([p], 2)
    optimizer.step()
    block = torch.zeros(40, 300, dtype=torch.bool, device=p.device)
    block[3, 128:256] = True
    for name in ("exp_avg", "exp_avg_sq"):
        decoded = optimizer.state_dict()["state"][0][name]
        assert decoded.isnan().equal(block)
        assert optimizer.state[p][f"{name}_code"][3, 128:256].eq(0).all()
        scales = torch.zeros(40, 3, dtype=torch.bool, device=p.device)
        scales[3, 1] = True
        assert optimizer.state[p][f"{name}_scale"].isnan().equal(scales)
    assert p.isnan()[3, 140]
    assert not p[~block].isnan().any()


@schemes
def test_a_grad_scaler_scales_and_skips(target, options):
    """A power of two changes no bit; an overflow changes nothing, and takes no noise."""
    params, optimizer = model(target, **options)
    copies, scaled = model(target, **options)
    scaler = torch.amp.GradScaler(target.device, init_scale=1024.0)
    done = 0
    for step in range(4):
        run(params, optimizer, 1, first=step)
        give_rounded_grads(copies, step)
        scaler.scale(torch.ones((), device=target.device))  # as the loss would be
        for p in copies:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            before = copies_of(scaled)
            copies[0].grad.view(-1)[0] = torch.inf
            scaler.step(scaled)
            assert unchanged_since(scaled, before)
            scaler.update(1024.0)
            give_rounded_grads(copies, step)
            for p in copies:
                p.grad.mul_(scaler.get_scale())
        scaler.step(scaled)
        scaler.update(1024.0)
        done += 1
    assert_same_state(optimizer, scaled)
    assert done == 4
    assert scaled.skipped_steps == 1


def test_bytes_per_parameter(target):
    """What the formats promise, as it is allocated."""
    shape, expected = (256, 1024), {"split": 10, "split-bfloat16": 6, "split-8bit": 4.0625, "stochastic": 4}
    for name, per_value in (expected | {"stochastic-8bit": 2.0625}).items():
        p = parameters([shape], dtype=BF16, device=target.device)[0]
        optimizer = target.adamw([p], **SCHEMES[name])
        run([p], optimizer, 1)
        held = sum(t.untyped_storage().nbytes() for key, t in optimizer.state[p].items() if key != "step")
        assert held == per_value * p.numel(), name
