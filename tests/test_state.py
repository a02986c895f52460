"""State, checkpoints in both directions, copies."""

import copy
import io
import pickle

import pytest
import torch
from common import NATIVE, assert_same_path, give_grads, parameters, snapshot, twins, unchanged_since

from fused_adamw import FusedHygieneAdamW

SHAPES = [(9,), (3, 4), (0,)]


def trained(make, params, steps=3, first=0):
    """An optimizer that has made some steps on `params`."""
    optimizer = make(params)
    train([(optimizer, params)], steps, first)
    return optimizer


def train(pairs, steps=3, first=0):
    """Take the same steps with several optimizers."""
    for step in range(first, first + steps):
        for optimizer, params in pairs:
            give_grads(params, step)
            optimizer.step()


def through_a_file(state_dict):
    """Save and load as users do, with torch.load's safe default."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []
    file.seek(0)
    return torch.load(file, weights_only=True)


def torch_adamw(params, **options):
    return torch.optim.AdamW(params, foreach=False, **options)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_keys_are_those_of_torch(target, amsgrad):
    params = parameters(SHAPES, device=target.device)
    ours = trained(lambda p: target.adamw(p, amsgrad=amsgrad, max_grad_norm=1.0), params).state_dict()
    theirs = trained(lambda p: torch_adamw(p, amsgrad=amsgrad), twins(params)).state_dict()
    assert ours.keys() == theirs.keys()
    assert [list(s) for s in ours["state"].values()] == [list(s) for s in theirs["state"].values()]
    assert [g.keys() for g in ours["param_groups"]] == [g.keys() for g in theirs["param_groups"]]
    assert ours["param_groups"][0]["decoupled_weight_decay"] is True


def test_defaults_are_those_of_torch():
    params = parameters(SHAPES)
    assert FusedHygieneAdamW(params).defaults == torch.optim.AdamW(params).defaults


def test_state_appears_with_the_first_gradient(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert list(optimizer.state) == [params[1]]


def test_step_is_a_tensor_of_its_own(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    steps = [optimizer.state[p]["step"] for p in params]
    for step, p in zip(steps, params, strict=True):
        assert step.shape == ()
        assert step.dtype == torch.float32
        assert step.device == p.device
        assert step.item() == 3
    assert len({step.data_ptr() for step in steps}) == len(params)


def test_moments_are_laid_out_as_the_parameter(target):
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(target.device, memory_format=torch.channels_last))
    trained(target.adamw, [p])
    optimizer = trained(target.adamw, [p])
    assert optimizer.state[p]["exp_avg"].stride() == optimizer.state[p]["exp_avg_sq"].stride() == p.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_reach_the_state(target, default_dtype, dtype):
    """Torchao's counts stopped at 256 this way."""
    default_dtype(dtype)
    (p,) = parameters([(3,)], device=target.device)
    optimizer = target.adamw([p], max_grad_norm=1.0)
    for _ in range(5 if target.slow else 300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert optimizer.state[p]["step"].item() == (5 if target.slow else 300)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert optimizer.grad_norm.dtype == torch.float32


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Adam])
def test_their_checkpoint_here(target, other, amsgrad):
    """Adam's, with decoupled decay, is AdamW's: training continues on the same path."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": amsgrad}
    if other is torch.optim.Adam:
        options["decoupled_weight_decay"] = True
    peers = parameters(SHAPES, device=target.device)
    theirs = trained(lambda p: other(p, foreach=False, **options), peers)
    params = twins(peers)
    ours = target.adamw(params)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 1e-2
    train([(theirs, peers), (ours, params)], first=3)
    assert_same_path(params, peers, 6)
    assert [ours.state[p]["step"].item() for p in params] == [6, 6, 6]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_our_checkpoint_there(target, other, amsgrad, options):
    params = parameters([(9,), (3, 4)], device=target.device)
    ours = trained(
        lambda p: target.adamw(p, lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, max_grad_norm=1e9), params
    )
    peers = twins(params)
    theirs = other(peers, **options)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    train([(theirs, peers), (ours, params)], first=3)
    assert_same_path(params, peers, 6, grad_error=1e-6)


def test_resuming_is_not_resuming(target):
    """A run that is saved and loaded goes on bit for bit as one that was not."""
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(lambda p: target.adamw(p, max_grad_norm=0.5), params)
    copies = twins(params)
    resumed = target.adamw(copies, max_grad_norm=0.5)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train([(optimizer, params), (resumed, copies)], first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def resume_from(target, change, **options):
    """A resumed optimizer, from a checkpoint that `change` has edited, beside one that went on."""
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    copies = twins(params)
    resumed = target.adamw(copies, **options)
    resumed.load_state_dict(saved)
    train([(optimizer, params), (resumed, copies)], first=3)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        step = resumed.state[q]["step"]
        assert step.shape == ()
        assert step.dtype == torch.float32
        assert step.item() == 6
    return resumed


@pytest.mark.parametrize(
    "form",
    [
        int,
        float,
        lambda step: step.reshape(1),
        lambda step: step.double(),
        lambda step: step.long(),
        lambda step: step.to("cpu"),
    ],
    ids=["int", "float", "1-dim", "float64", "int64", "cpu"],
)
def test_steps_of_any_form(target, form):
    def change(saved):
        for state in saved["state"].values():
            state["step"] = form(state["step"])

    resume_from(target, change)


def test_steps_that_share_a_tensor(target):
    """A shared count would advance once for every parameter."""

    def change(saved):
        for state in saved["state"].values():
            state["step"] = saved["state"][0]["step"]

    resume_from(target, change)


def test_steps_shared_by_hand(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    shared = torch.tensor(3.0, device=target.device)
    for p in params:
        optimizer.state[p]["step"] = shared
    train([(optimizer, params)], 2, first=3)
    assert [optimizer.state[p]["step"].item() for p in params] == [5, 5, 5]


@pytest.mark.parametrize(
    "step",
    [
        257.0,
        torch.tensor(257.0),
        257,
    ],
    ids=["float", "tensor", "int"],
)
def test_loaded_step_does_not_pass_through_the_default_dtype(target, default_dtype, step):
    params = parameters([(3,)], device=target.device)
    saved = trained(target.adamw, params).state_dict()
    saved["state"][0]["step"] = step
    optimizer = target.adamw(params)
    default_dtype(torch.bfloat16)
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[0]]["step"].item() == 257


def test_keys_that_older_versions_did_not_save(target):
    def change(saved):
        for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            del saved["param_groups"][0][key]
        del saved["param_groups"][0]["decoupled_weight_decay"]

    resumed = resume_from(target, change)
    assert resumed.param_groups[0].keys() == torch.optim.AdamW(parameters(SHAPES)).param_groups[0].keys()


def test_saved_options_replace_the_constructor_s(target):
    params = parameters(SHAPES, device=target.device)
    saved = trained(lambda p: target.adamw(p, lr=0.5, betas=(0.1, 0.2), maximize=True), params).state_dict()
    optimizer = target.adamw(params, max_grad_norm=3.0)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["maximize"]) == (0.5, (0.1, 0.2), True)
    assert optimizer.max_grad_norm == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_state_dtype_survives_a_checkpoint(target, dtype, state_dtype):
    """Torch casts moments to the parameter's dtype; then a resumed run would be another run."""
    params = parameters(SHAPES, dtype=dtype, device=target.device)
    optimizer = trained(lambda p: target.adamw(p, state_dtype=state_dtype), params)
    copies = twins(params)
    resumed = target.adamw(copies, state_dtype=state_dtype)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, copies, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[q][key].dtype == state_dtype
            assert torch.equal(resumed.state[q][key], optimizer.state[p][key])
    train([(optimizer, params), (resumed, copies)], first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_without_state_dtype_moments_take_the_parameter_s(target):
    params = parameters(SHAPES, dtype=torch.bfloat16, device=target.device)
    saved = trained(lambda p: target.adamw(p, state_dtype=torch.float32), params).state_dict()
    optimizer = target.adamw(params)
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_nothing_is_shared_with_the_loaded_dict(target):
    params = parameters(SHAPES, device=target.device)
    saved = trained(target.adamw, params).state_dict()
    before = copy.deepcopy(saved["state"])
    optimizer = target.adamw(twins(params))
    optimizer.load_state_dict(saved)
    train([(optimizer, optimizer.param_groups[0]["params"])])
    for index, state in saved["state"].items():
        assert all(torch.equal(state[key], before[index][key]) for key in state)


def test_checkpoint_loads_during_training(target):
    """Back to an earlier point: tables of the abandoned state are not used any more."""
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    results = []
    for _ in range(2):
        train([(optimizer, params)], first=3)
        results.append([p.detach().clone() for p in params])
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unknown_state_is_kept(target):
    params = parameters([(3,)], device=target.device)
    optimizer = trained(target.adamw, params)
    optimizer.state[params[0]]["note"] = torch.tensor(7.0)
    train([(optimizer, params)], first=3)
    other = target.adamw(twins(params))
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["state"][0]["note"].item() == 7.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(target, duplicate):
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(
        lambda p: target.adamw(p, lr=1e-2, max_grad_norm=0.5, state_dtype=torch.bfloat16), params
    )
    twin = duplicate(optimizer)
    assert twin.max_grad_norm == 0.5
    assert twin.backend == target.backend
    assert twin.state_dtype == torch.bfloat16
    assert twin._step_supports_amp_scaling
    assert torch.equal(twin.grad_norm, optimizer.grad_norm)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public <= set(vars(twin))
    copies = twin.param_groups[0]["params"]
    assert not {p.data_ptr() for p in params if p.numel()} & {p.data_ptr() for p in copies}
    train([(optimizer, params), (twin, copies)], first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert torch.equal(twin.grad_norm, optimizer.grad_norm)


def test_groups_of_another_composition_are_refused(target):
    params = parameters(SHAPES, device=target.device)
    saved = trained(lambda p: target.adamw([{"params": p[:1]}, {"params": p[1:]}]), params).state_dict()
    optimizer = trained(target.adamw, params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    swapped = target.adamw([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match="doesn't match the size"):
        swapped.load_state_dict(saved)
    assert unchanged_since(optimizer, before)


def test_names_in_another_order_are_refused(target):
    params = parameters([(3,), (3,)], device=target.device)
    saved = trained(target.adamw, params).state_dict()
    saved["param_groups"][0]["param_names"] = ["a", "b"]
    optimizer = target.adamw(list(zip(["b", "a"], params, strict=True)))
    with pytest.raises(ValueError, match="2 parameters changed place inside a group: b, a"):
        optimizer.load_state_dict(saved)


def test_user_hooks_see_loading_and_saving():
    params = parameters(SHAPES)
    optimizer = trained(NATIVE.adamw, params)
    calls = []
    optimizer.register_state_dict_post_hook(lambda o, sd: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))

    def halve(o, sd):
        sd = copy.deepcopy(sd)
        for state in sd["state"].values():
            state["step"] = state["step"] - 1
        return sd

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loaded"]
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]], ids=["numbered", "named"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {"step": 3, "state1": s["exp_avg"], "state2": s["exp_avg_sq"]},
            r"has no exp_avg, exp_avg_sq: .* found step, state1, state2\. docs/migration\.md",
        ),
        (
            lambda s: {"step": s["step"], "exp_avg_sq": s["exp_avg_sq"]},
            "has no exp_avg: .* found step, exp_avg_sq",
        ),
        (lambda s: {"exp_avg": s["exp_avg"], "exp_avg_sq": s["exp_avg_sq"]}, "has no step: "),
        (
            lambda s: {"momentum_buffer": s["exp_avg"]},
            "has no step, exp_avg, exp_avg_sq: .* found momentum_buffer",
        ),
        (lambda s: {"step": torch.zeros(())}, "has no exp_avg, exp_avg_sq: .* found step"),
        (lambda s: {**s, "exp_avg": None}, "is a NoneType, expected a floating point tensor"),
        (lambda s: {**s, "exp_avg_sq": s["exp_avg_sq"].byte()}, r"is a tensor of torch\.uint8, expected"),
        (lambda s: {**s, "exp_avg": s["exp_avg"][:1]}, r"is \(1, 4\) on .*, expected \(3, 4\) on"),
        (lambda s: {**s, "step": s["exp_avg"]}, r"is a tensor of shape \(3, 4\), expected a number"),
        (lambda s: {**s, "step": None}, "is None, expected a number"),
    ],
    ids=[
        "bitsandbytes",
        "a moment lost",
        "step lost",
        "SGD",
        "moments lost at step 0",
        "none",
        "8-bit",
        "would broadcast",
        "step of many",
        "step of none",
    ],
)
@pytest.mark.parametrize("way", ["loaded", "set"])
def test_a_state_that_is_not_adamw_s_is_refused(target, way, names, change, message):
    """What is missing would start from zero; torch raises KeyError, having loaded."""
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(list(zip(names, params, strict=True)) if names else params)
    train([(optimizer, params)])
    state = optimizer.state[params[1]]
    name = "'b'" if names else "number 1 of group 0"
    if way == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][1] = change(saved["state"][1])
        saved["param_groups"][0]["lr"] = 0.5
    else:
        optimizer.state[params[1]] = change(state)
        give_grads(params, 3)
    before, values = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state[params[0]])
    with pytest.raises(RuntimeError, match=f"parameter {name} {message}"):
        optimizer.load_state_dict(saved) if way == "loaded" else optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    optimizer.state[params[1]] = state
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(torch.equal(optimizer.state[params[0]][key], value) for key, value in values.items())
    train([(optimizer, params)], first=3)


@pytest.mark.parametrize("way", ["loaded", "set"])
def test_amsgrad_may_begin_with_a_state_without_a_maximum(target, way):
    """The maximum then starts with the next step, as if there were none before; torch raises KeyError."""
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    if way == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["amsgrad"] = True
        optimizer.load_state_dict(saved)
    else:
        optimizer.param_groups[0]["amsgrad"] = True
    for scale in (1.0, 0.0):
        give_grads(params, 3, scale=scale)
        optimizer.step()
        state = optimizer.state[params[0]]
        if scale:
            assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
        else:
            assert state["max_exp_avg_sq"].gt(state["exp_avg_sq"]).all()


def test_notes_on_a_parameter_without_gradients_are_nobody_s_business(target):
    """They become so with the first gradient, as in torch."""
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params)
    optimizer.state[params[2]]["note"] = "frozen"
    for step in range(2):
        give_grads(params[:2], step)
        optimizer.step()
    assert optimizer.state[params[2]] == {"note": "frozen"}
    give_grads(params, 2)
    with pytest.raises(RuntimeError, match="number 2 of group 0 has no step, exp_avg, exp_avg_sq"):
        optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("way", ["loaded", "set"])
def test_a_differentiable_group_is_refused(target, way):
    """As by the constructor; it would be ignored in silence."""
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)
    before = snapshot(optimizer)
    give_grads(params, 3)
    refused = pytest.raises(RuntimeError, match="`fused` does not support `differentiable`")
    if way == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["differentiable"] = True
        with refused:
            optimizer.load_state_dict(saved)
        assert not optimizer.param_groups[0]["differentiable"]
    else:
        optimizer.param_groups[0]["differentiable"] = True
        with refused:
            optimizer.step(lambda: pytest.fail("the closure ran"))
        optimizer.param_groups[0]["differentiable"] = False
    assert unchanged_since(optimizer, before)
    optimizer.step()


def test_options_of_others_stay_in_a_group_and_change_nothing(target):
    """As in torch: a scheduler's `initial_lr` must stay, and nobody can tell it from apex's options."""
    foreign = {"initial_lr": 0.5, "bias_correction": False, "state_dtype": "float32"}

    def change(saved):
        saved["param_groups"][0].update(foreign)

    resumed = resume_from(target, change)
    assert resumed.param_groups[0].items() >= foreign.items()
    for make in (torch_adamw, target.adamw):
        params = twins(resumed.param_groups[0]["params"])
        other = make(params)
        other.load_state_dict(through_a_file(resumed.state_dict()))
        assert other.param_groups[0].items() >= foreign.items()
        train([(other, params)])
        assert other.state[params[0]]["step"].item() == 9
