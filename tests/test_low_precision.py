"""Masters, codes and stochastic rounding in an optimizer: what its state holds, and what steps make of it."""

import copy
import pickle

import pytest
import torch
from common import give_grads, parameters, randn, twins, unchanged_since
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
        give_rounded_grads(params, step)
        optimizer.step()


def give_rounded_grads(params, step):
    """Gradients whose values are the same in float32 as in bfloat16."""
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=7919 * step + i + 1, dtype=BF16).to(p.device, p.dtype)


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


def test_residuals_without_a_master_are_dropped_with_a_warning(target):
    params, optimizer = model(target, master_weights="split")
    run(params, optimizer, 2)
    plain = target.adamw(twins(params))
    with pytest.warns(UserWarning, match="has masters of 5 parameters, .* 0 .* among them"):
        plain.load_state_dict(optimizer.state_dict())
    assert all("master_residual" not in state for state in plain.state.values())
    run(plain.param_groups[0]["params"], plain, 1)


def test_a_checkpoint_without_residuals_starts_from_the_parameters(target):
    params, optimizer = model(target, master_weights="split", state_dtype=F32)
    run(params, optimizer, 2)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("master_residual")
    optimizer.load_state_dict(saved)
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    peer = target.adamw(masters, lr=1e-2, max_grad_norm=1.0, state_dtype=F32)
    peer.load_state_dict(saved)
    run(params, optimizer, 3, first=2)
    run(masters, peer, 3, first=2)
    skip_without_kernels(optimizer)
    assert_masters(params, optimizer, masters)


def skip_without_kernels(optimizer):
    """The reference rounds otherwise than kernels do."""
    if optimizer._plan.fallbacks:
        pytest.skip(str(optimizer._plan.fallbacks))


def assert_masters(params, optimizer, expected):
    """Parameters and residuals are the two halves of float32 parameters."""
    for p, q in zip(params, expected, strict=True):
        master = Field(SPLIT, p.detach(), optimizer.state[p]["master_residual"])
        assert same_bits(master.load(), q.detach())
        assert same_bits(p.detach(), SPLIT.store(q.detach(), None, p)[0])


@schemes
def test_copies_and_pickles_go_on_with_the_same_bits(target, options):
    params, optimizer = model(target, seed=3, **options)
    run(params, optimizer, 2)
    others = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    run(params, optimizer, 2, first=2)
    for copies, other in others:
        run(copies, other, 2, first=2)
        assert_same_state(optimizer, other)
        assert other.seed == optimizer.seed
        assert repr(other) == repr(optimizer)


# ---- Masters


def test_split_is_float32_with_a_rounded_copy(target):
    """Bit for bit, whatever the moments are kept in."""
    for name, steps in (("split", 200), ("split-bfloat16", 20), ("split-8bit", 20)):
        steps, options = min(steps, 20) if target.slow else steps, SCHEMES[name]
        params, optimizer = model(target, **options)
        masters = [torch.nn.Parameter(p.detach().float()) for p in params]
        peer = target.adamw(masters, lr=1e-2, max_grad_norm=1.0, **{**options, "master_weights": None})
        run(params, optimizer, steps)
        run(masters, peer, steps)
        skip_without_kernels(optimizer)
        assert_masters(params, optimizer, masters)


def test_a_weight_that_is_zeroed_by_hand_stays_zero(target):
    """Its residual would else make it a tiny number again."""
    p = parameters([(40, 130)], dtype=BF16, device=target.device)[0]
    optimizer = target.adamw([p], master_weights="split", state_dtype=F32)
    run([p], optimizer, 3)
    mask = optimizer.state[p]["master_residual"] < 0
    assert mask.any()
    with torch.no_grad():
        p[mask] = 0
        p[0, 0] = -0.0
        p.grad.zero_()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key][mask] = 0
    optimizer.step()
    assert (p[mask] == 0).all()


def test_weights_that_are_loaded_later_survive(target):
    """What is left of the old master is half a unit in the last place; `resync_master` drops it."""
    params, optimizer = model(target, master_weights="split", state_dtype=F32)
    run(params, optimizer, 3)
    new = [torch.nn.Parameter(p.detach().clone()) for p in parameters(SHAPES, seed=5, dtype=BF16)]
    with torch.no_grad():
        for p, q in zip(params, new, strict=True):
            p.copy_(q)
    loaded = optimizer.master_state_dict(torch.nn.ParameterList(params))
    for i, p in enumerate(params):
        assert (loaded[str(i)] - p.float()).abs().le(2.0**-8 * p.detach().float().abs()).all()
    optimizer.resync_master()
    loaded = optimizer.master_state_dict(torch.nn.ParameterList(params))
    assert all(same_bits(loaded[str(i)], p.detach().float()) for i, p in enumerate(params))
    assert all(p.equal(q.to(p.device)) for p, q in zip(params, new, strict=True))


class Net(torch.nn.Module):
    """With a tied weight, a buffer, and a weight in float32."""

    def __init__(self, dtype=BF16):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 90)
        self.body = torch.nn.Linear(90, 90)
        self.norm = torch.nn.BatchNorm1d(90)
        self.head = torch.nn.Linear(90, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)
        self.norm.float()


def test_masters_are_taken_from_a_float32_model_and_given_back(target):
    torch.manual_seed(0)
    full = Net(F32).to(target.device)
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split", state_dtype=F32, max_grad_norm=1.0)
    expected = {key: value.clone() for key, value in full.state_dict().items()}
    net.load_state_dict(expected)
    optimizer.load_master(expected)
    for name, p in net.named_parameters():
        if p.dtype == BF16:
            assert same_bits(p.detach(), SPLIT.store(expected[name], None, p)[0])
    found = optimizer.master_state_dict(net)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert same_bits(value, expected[key]), key
    assert found["head.weight"] is found["embedding.weight"]
    peer = target.adamw(full, state_dtype=F32, max_grad_norm=1.0)
    for step in range(3):
        for model_, each in ((net, optimizer), (full, peer)):
            run(list(model_.parameters()), each, 1, first=step)
    skip_without_kernels(optimizer)
    found = optimizer.master_state_dict(net)
    assert all(same_bits(found[name], p.detach()) for name, p in full.named_parameters())


def test_masters_are_found_under_any_name_of_a_tied_weight(target):
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split")
    weights = {key: value.float() for key, value in net.state_dict().items()}
    del weights["embedding.weight"]
    weights["head.weight"] += 1e-4
    optimizer.load_master(weights)
    assert same_bits(optimizer.master_state_dict(net)["head.weight"], weights["head.weight"])


def test_masters_that_do_not_fit_are_refused_before_anything_changes(target):
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split")
    weights = {key: value.float() + 1 for key, value in net.state_dict().items()}
    before = copies_of(optimizer)
    missing = {key: value for key, value in weights.items() if key != "body.bias"}
    with pytest.raises(ValueError, match=r"'body.bias' is not in the state_dict: .* under body.bias"):
        optimizer.load_master(missing)
    with pytest.raises(RuntimeError, match=r"'body.bias' is \(3,\), expected \(90,\)"):
        optimizer.load_master({**weights, "body.bias": torch.zeros(3)})
    assert unchanged_since(optimizer, before)
    with pytest.raises(ValueError, match="no masters"):
        target.adamw(net).load_master(weights)
    run(list(net.parameters()), optimizer, 1)
    with pytest.raises(ValueError, match=r"'embedding.weight' is not in the model's state_dict"):
        optimizer.master_state_dict(net.body)
