"""Masters, codes and stochastic rounding in an optimizer: what its state holds, and what steps make of it."""

import pytest
import torch
from common import give_grads, parameters, twins, unchanged_since
from common import snapshot as copies_of

from fused_adamw import FusedHygieneAdamW
from fused_adamw.formats import FORMATS, Field

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((40, 130), (7,), (32, 3, 7, 7), (5, 5), ())
SPLIT = FORMATS["bfloat16_split"]
SCHEMES = {
    "split": {"master_weights": "split", "state_dtype": F32},
    "split-bfloat16": {"master_weights": "split", "state_dtype": BF16},
    "split-8bit": {"master_weights": "split", "state_dtype": "8bit"},
    "stochastic": {"stochastic_rounding": True},
    "stochastic-8bit": {"stochastic_rounding": True, "state_dtype": "8bit"},
}
schemes = pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
CODES = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")


def model(target, dtype=BF16, seed=0, **options):
    """Parameters, and an optimizer of them."""
    params = parameters(SHAPES, seed=seed, dtype=dtype, device=target.device)
    return params, target.adamw(params, lr=1e-2, max_grad_norm=1.0, **options)


def run(params, optimizer, steps, first=0):
    for step in range(first, first + steps):
        give_grads(params, step, BF16)
        for p in params:
            p.grad = p.grad.to(p.dtype)
        optimizer.step()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


def assert_same_state(a, b):
    """Whether two optimizers hold the same, bit for bit."""
    for p, q in zip(*([p for g in o.param_groups for p in g["params"]] for o in (a, b)), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert same_bits(value, b.state[q][key]), key


# ---- What a state holds


def test_state_has_the_keys_that_were_asked_for(target):
    params, optimizer = model(target, master_weights="split", state_dtype="8bit")
    run(params, optimizer, 1)
    for p in params:
        state = optimizer.state[p]
        is_coded = p.dim() >= 2 and p.numel() >= 4096
        moments = CODES if is_coded else ("exp_avg", "exp_avg_sq")
        assert set(state) == {"step", "master_residual", *moments}
        assert state["master_residual"].dtype == torch.int16
        assert all(state[key].device == p.device for key in state)
        like_p = [key for key in state if key != "step" and not key.endswith("scale")]
        assert all(state[key].shape == p.shape and state[key].stride() == p.stride() for key in like_p)
    state = optimizer.state[params[0]]
    assert [state[key].dtype for key in CODES] == [torch.int8, F32, torch.uint8, F32]
    assert state["exp_avg_scale"].shape == state["exp_avg_sq_scale"].shape == (40, 2)
    assert optimizer.state[params[2]]["exp_avg_scale"].shape == (32, 2)  # 147 values in a row
    assert optimizer.state[params[1]]["exp_avg"].dtype == BF16


@schemes
def test_a_skipped_step_changes_nothing(target, options):
    params, optimizer = model(target, skip_nonfinite=True, **options)
    run(params, optimizer, 2)
    before = copies_of(optimizer)
    params[0].grad.view(-1)[3] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert unchanged_since(optimizer, before)


# ---- Checkpoints


@schemes
def test_a_checkpoint_restores_every_bit(target, options):
    params, optimizer = model(target, **options)
    run(params, optimizer, 3)
    saved = optimizer.state_dict()
    copies, resumed = twins(params), None
    resumed = target.adamw(copies, lr=1e-2, max_grad_norm=1.0, **options)
    resumed.load_state_dict(saved)
    assert_same_state(optimizer, resumed)
    run(params, optimizer, 2, first=3)
    run(copies, resumed, 2, first=3)
    assert_same_state(optimizer, resumed)


def test_a_checkpoint_is_torch_s(target):
    params, optimizer = model(target, state_dtype="8bit")
    run(params, optimizer, 3)
    saved = optimizer.state_dict()
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in saved["state"].values())
    state, kept = saved["state"][0], optimizer.state[params[0]]
    for moment, format in (("exp_avg", "root_signed"), ("exp_avg_sq", "root_unsigned")):
        field = Field(FORMATS[format], kept[f"{moment}_code"], kept[f"{moment}_scale"])
        assert same_bits(state[moment], field.load())
        assert state[moment].stride() == params[0].stride()
    assert set(kept) == {"step", *CODES}  # the optimizer's own state is left as it was
    theirs = torch.optim.AdamW(twins(params), foreach=False)
    theirs.load_state_dict(saved)
    theirs_params = theirs.param_groups[0]["params"]
    give_grads(theirs_params, 0)
    theirs.step()


def test_moments_of_torch_are_rounded_to_the_nearest_code(target):
    params = parameters(SHAPES, device=target.device)
    theirs = torch.optim.AdamW(params, foreach=False)
    give_grads(params, 0)
    theirs.step()
    optimizer = target.adamw(params, state_dtype="8bit")
    optimizer.load_state_dict(theirs.state_dict())
    kept, moments = optimizer.state[params[0]], theirs.state[params[0]]
    for moment, format in (("exp_avg", "root_signed"), ("exp_avg_sq", "root_unsigned")):
        expected = FORMATS[format].encode(moments[moment], params[0])
        assert same_bits(kept[f"{moment}_code"], expected.values)
        assert same_bits(kept[f"{moment}_scale"], expected.side)


# ---- What is refused


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("exp_avg_code", lambda t: t.to(BF16), "exp_avg_code of parameter .* is torch.bfloat16, expected"),
        ("exp_avg_scale", lambda t: t.to(BF16), "exp_avg_scale of parameter .* is torch.bfloat16, expected"),
        ("master_residual", lambda t: t.to(BF16), "master_residual of parameter .* is torch.bfloat16, exp"),
        ("exp_avg_sq_code", lambda t: t.view(torch.int8), "exp_avg_sq_code .* torch.int8, expected torch.u"),
        ("exp_avg_sq_scale", lambda t: t[:1], r"exp_avg_sq_scale .* \(1, 2\) on .*, expected \(40, 2\)"),
        ("exp_avg_code", lambda t: t[:1], r"exp_avg_code .* \(1, 130\) on .*, expected \(40, 130\)"),
        ("master_residual", lambda t: 0, "master_residual of parameter .* is a int, expected torch.int16"),
        ("exp_avg_code", lambda t: t[:, :1].expand_as(t), "exp_avg_code .* it is an expanded view"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(target, key, change, message):
    params, optimizer = model(target, master_weights="split", state_dtype="8bit")
    run(params, optimizer, 1)
    state = optimizer.state[params[0]]
    state[key] = change(state[key])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=message):
        run(params, optimizer, 1)
    assert all(same_bits(p.detach(), old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("key", CODES)
def test_a_state_without_one_of_its_parts_is_refused(target, key):
    params, optimizer = model(target, state_dtype="8bit")
    run(params, optimizer, 1)
    del optimizer.state[params[0]][key]
    missing = key.replace("_code", "")
    with pytest.raises(RuntimeError, match=rf"the state of parameter .* has no {missing}:"):
        run(params, optimizer, 1)


def test_a_residual_without_its_parameter_is_refused():
    p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer = FusedHygieneAdamW([p], master_weights="split")
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data, p.grad = p.data.float(), None
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"is torch\.float32 and has a master_residual"):
        optimizer.step()
