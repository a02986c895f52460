"""Masters, codes and stochastic rounding in an optimizer's state, and in its checkpoints."""

import copy
import pickle

import pytest
import torch
from common import give_grads, parameters, twins, unchanged_since
from common import snapshot as copies_of
from low_precision import BF16, CODES, F32, SHAPES, assert_same_state, model, run, same_bits, schemes

from fused_adamw import FusedHygieneAdamW
from fused_adamw.formats import FORMATS, Field

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


# ---- Compact checkpoints, and those that others had


@schemes
def test_a_compact_checkpoint_restores_every_bit(target, options):
    params, optimizer = model(target, **options)
    run(params, optimizer, 3)
    saved = optimizer.state_dict_compact()
    assert all(saved["state"][i] == optimizer.state[p] for i, p in enumerate(params))
    resumed = target.adamw(twins(params), **options)
    resumed.load_state_dict(saved)
    assert_same_state(optimizer, resumed)
    assert resumed.state[resumed.param_groups[0]["params"][0]] is not optimizer.state[params[0]]


@pytest.mark.parametrize("compact", [False, True])
def test_codes_follow_the_layout_of_the_parameter_that_loads_them(target, compact):
    p = parameters([(32, 16, 3, 3)], device=target.device)[0]
    optimizer = target.adamw([p], state_dtype="8bit")
    run([p], optimizer, 2)
    saved = optimizer.state_dict_compact() if compact else optimizer.state_dict()
    q = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    resumed = target.adamw([q], state_dtype="8bit")
    resumed.load_state_dict(saved)
    assert resumed.state[q]["exp_avg_code"].is_contiguous(memory_format=torch.channels_last)
    for key, moment in optimizer.state_dict()["state"][0].items():
        format = {"exp_avg": "root_signed", "exp_avg_sq": "root_unsigned"}.get(key)
        if format is not None:
            expected = FORMATS[format].encode(moment, q)
            assert same_bits(resumed.state[q][f"{key}_code"], expected.values)
            assert same_bits(resumed.state[q][f"{key}_scale"], expected.side)


@pytest.mark.parametrize(("dtype", "moment"), [(BF16, "exp_avg"), (torch.float16, "exp_avg")])
def test_moments_that_were_rounded_after_decoding_are_refused(target, dtype, moment):
    params = parameters(SHAPES, dtype=dtype, device=target.device)
    optimizer = target.adamw(params, state_dtype="8bit")
    run(params, optimizer, 2)
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(optimizer.state_dict())  # casts to the parameter's dtype
    before = copies_of(optimizer)
    with pytest.raises(RuntimeError, match=f"the saved {moment} of .* is what 8-bit moments decode to, r"):
        optimizer.load_state_dict(theirs.state_dict())
    assert unchanged_since(optimizer, before)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize("kind", ["normal", "ones", "one per row", "zeros"])
def test_moments_of_torch_in_any_dtype_are_taken(target, dtype, kind):
    params = parameters(SHAPES, dtype=dtype, device=target.device)
    theirs = torch.optim.AdamW(params, foreach=False)
    for step in range(3):
        give_grads(params, step)
        for p in params:
            one = torch.zeros_like(p)
            one.view(-1)[:: max(1, p.shape[-1] if p.dim() else 1)] = 0.37
            grads = {"ones": torch.ones_like(p), "one per row": one, "zeros": torch.zeros_like(p)}
            p.grad = grads.get(kind, p.grad)
        theirs.step()
    optimizer = target.adamw(params, state_dtype="8bit")
    optimizer.load_state_dict(theirs.state_dict())
    assert set(optimizer.state[params[0]]) == {"step", *CODES}


@schemes
def test_copies_and_pickles_go_on_with_the_same_bits(target, options):
    params, optimizer = model(target, params_seed=3, seed=5, **options)
    run(params, optimizer, 2)
    others = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    run(params, optimizer, 2, first=2)
    for copies, other in others:
        run(copies, other, 2, first=2)
        assert_same_state(optimizer, other)
        assert other.seed == optimizer.seed
        assert repr(other) == repr(optimizer)
