"""PyTorch's own inputs of AdamW through PyTorch's own kinds of checks, on every backend."""

import copy
import io
import math
import pickle

import pytest
import torch
from common import NATIVE, assert_same_path, give_grads, parameters, snapshot, twins, unchanged_since
from torch import nn

from .torch_optim import ADAMW, ERRORS, INPUTS, kwargs_of

SHAPES = [(65,), (3, 7), ()]
STEPS = 6

every_input = pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: entry.desc.replace(" ", "-"))


def test_torch_gives_inputs():
    """That what follows is not empty."""
    assert {entry.desc for entry in INPUTS} >= {"default", "non-default lr", "maximize", "amsgrad"}
    assert any(isinstance(entry.kwargs.get("lr"), torch.Tensor) for entry in INPUTS)
    assert any(isinstance(entry.kwargs.get("betas", [0])[0], torch.Tensor) for entry in INPUTS)
    assert len(ERRORS) >= 12


def steps_of(target):
    return 2 if target.slow else STEPS


def train(pairs, steps=STEPS, first=0):
    for step in range(first, first + steps):
        for optimizer, params in pairs:
            give_grads(params, step)
            optimizer.step()


def trained(target, entry, shapes=SHAPES, steps=3, **options):
    params = parameters(shapes, device=target.device)
    optimizer = target.adamw(params, **kwargs_of(entry), **options)
    train([(optimizer, params)], steps)
    return optimizer, params


def assert_torch_path(entry, params, peers, steps):
    """Torch works bias corrections out in the dtype of tensor betas: in float32, 1 - 0.99 is off by 1e-5."""
    float32_betas = isinstance(entry.kwargs.get("betas", (0.9,))[0], torch.Tensor) and (
        params[0].dtype == torch.float32
    )
    assert_same_path(params, peers, steps, grad_error=1e-5 if float32_betas else 0.0)


def groups_by_lr(params):
    return [{"params": params[:1], "lr": 1e-2, "weight_decay": 0.3}, {"params": params[1:], "eps": 1e-6}]


@every_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [list, groups_by_lr], ids=["list", "groups"])
def test_same_as_torch(target, entry, dtype, groups):
    params = parameters(SHAPES, dtype=dtype, device=target.device)
    peers = twins(params)
    ours = target.adamw(groups(params), **kwargs_of(entry, dtype))
    theirs = torch.optim.AdamW(groups(peers), foreach=False, **kwargs_of(entry, dtype))
    train([(ours, params), (theirs, peers)], steps_of(target))
    assert_torch_path(entry, params, peers, steps_of(target))
    for p, q in zip(params, peers, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert ours.state[p][key].dtype == (torch.float32 if key == "step" else value.dtype)


@every_input
@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_flags_that_torch_takes(target, entry, flags):
    """To the same result as without. Torch refuses foreach with tensors, and so do we."""
    results = []
    for options in ({}, flags):
        params = parameters(SHAPES, device=target.device)
        if options.get("foreach") and any("Tensor" in str(type(v)) for v in entry.kwargs.values()):
            for make in (torch.optim.AdamW, target.adamw):
                with pytest.raises(ValueError, match="not supported for capturable=False and foreach=True"):
                    make(params, **kwargs_of(entry), **options)
            return
        optimizer = target.adamw(params, **kwargs_of(entry), **options)
        train([(optimizer, params)], 2)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc.replace(" ", "-"))
def test_errors(error):
    given = error.optimizer_error_input
    params = parameters([(1, 1)]) if given.params is None else given.params
    warns = issubclass(error.error_type, Warning)
    with (pytest.warns if warns else pytest.raises)(error.error_type, match=error.error_regex):
        NATIVE.adamw(params, **given.kwargs)


@pytest.mark.filterwarnings("ignore:Lazy modules|Detected call of")
@every_input
@pytest.mark.parametrize("schedulers", [(), *ADAMW.scheduler_inputs], ids=lambda s: f"{len(s)}-schedulers")
def test_goes_in_the_right_direction(target, entry, schedulers):
    """Downhill, or uphill where it maximizes, from what torch starts with."""
    weight = nn.Parameter(torch.randn(10, 5, generator=torch.Generator().manual_seed(0)).to(target.device))
    bias = nn.Parameter(torch.randn(10, generator=torch.Generator().manual_seed(1)).to(target.device))
    x = torch.randn(5, generator=torch.Generator().manual_seed(2)).to(target.device)
    optimizer = target.adamw([weight, bias], **kwargs_of(entry))
    made = [make(optimizer) for make in schedulers]

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    losses = [closure().item()]
    for _ in range(steps_of(target)):
        optimizer.step(closure)
        for scheduler in made:
            scheduler.step(*([losses[0]] if "Plateau" in type(scheduler).__name__ else []))
    losses.append(closure().item())
    assert (losses[1] > losses[0]) == bool(entry.kwargs.get("maximize"))


@every_input
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_groups_take_what_they_do_not_say_from_the_arguments(target, entry, decay):
    params = parameters([(4,), (4,)], device=target.device)
    optimizer = target.adamw(
        [{"params": params[:1], "weight_decay": decay}, {"params": params[1:], "lr": 0.25}],
        **kwargs_of(entry),
    )
    default = torch.optim.AdamW(twins(params), **kwargs_of(entry)).param_groups[0]
    for group, changed in zip(optimizer.param_groups, ({"weight_decay": decay}, {"lr": 0.25}), strict=True):
        rest = {key: value for key, value in group.items() if key not in ("params", *changed)}
        assert str(rest) == str({key: default[key] for key in rest})
        assert group.items() >= changed.items()


@every_input
def test_no_op_without_gradients(target, entry):
    params = parameters(SHAPES, device=target.device)
    before = [p.detach().clone() for p in params]
    optimizer = target.adamw(params, **kwargs_of(entry))
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state_dict()["state"]


@every_input
def test_zero_gradients_decay_alone(target, entry):
    (p,) = parameters([(9,)], device=target.device)
    before = p.detach().clone()
    optimizer = target.adamw([p], **kwargs_of(entry))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    group = optimizer.param_groups[0]
    expected = before * (1 - float(group["lr"]) * group["weight_decay"])
    torch.testing.assert_close(p.detach(), expected, rtol=2**-23, atol=0)
    assert optimizer.state[p]["step"].item() == 1


@every_input
@pytest.mark.parametrize("sources", ["torch into ours", "ours into torch", "ours into ours"])
def test_state_dict_round_trip(target, entry, sources):
    """Loaded with `weights_only=True`; then both go on alike, bit for bit where both are ours."""
    source, sink = sources.split(" into ")
    make = {
        "ours": target.adamw,
        "torch": lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw),
    }
    params = parameters(SHAPES, device=target.device)
    first = make[source](params, **kwargs_of(entry))
    train([(first, params)], 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    copies = twins(params)
    second = make[sink](copies, **kwargs_of(entry))
    second.load_state_dict(torch.load(file, weights_only=True))
    train([(first, params), (second, copies)], 3, first=3)
    if source == sink:
        assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    else:
        assert_torch_path(entry, params, copies, 6)


@every_input
def test_older_checkpoints(target, entry):
    """Without the flags that torch's AdamW did not have from the beginning."""
    optimizer, params = trained(target, entry)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in ADAMW.not_og_supported_flags:
            del group[flag]
    other = target.adamw(twins(params), **kwargs_of(entry))
    other.load_state_dict(saved)
    assert str(other.state_dict()) == str(optimizer.state_dict())
    train([(other, other.param_groups[0]["params"])], 1)


@every_input
@pytest.mark.parametrize("names", [(False, True), (True, False), (True, True)], ids=str)
def test_named_and_unnamed_checkpoints(target, entry, names):
    """Names are kept where one of the two has them."""
    given = ["a", "b", "c"]
    optimizers = []
    for named in names:
        params = parameters(SHAPES, device=target.device)
        groups = list(zip(given, params, strict=True)) if named else params
        optimizers.append(target.adamw(groups, **kwargs_of(entry)))
        train([(optimizers[-1], params)], 1)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state_dict()["param_groups"][0]["param_names"] == given


@every_input
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_all_public_attributes(target, entry, duplicate):
    optimizer, params = trained(target, entry, max_grad_norm=0.5, skip_nonfinite=True)
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(optimizer, name)
    twin = duplicate(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public == {name for name in dir(twin) if not name.startswith("_")}
    for name in ("max_grad_norm", "skip_nonfinite", "backend", "state_dtype", "_step_supports_amp_scaling"):
        assert getattr(twin, name) == getattr(optimizer, name)
    assert torch.equal(twin.grad_norm, optimizer.grad_norm)
    copies = twin.param_groups[0]["params"]
    train([(optimizer, params), (twin, copies)], 2, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@every_input
def test_state_dict_hooks(target, entry):
    """In torch's order; those of `prepend` first; what they return is what is saved or loaded."""
    optimizer, _ = trained(target, entry)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "note": 1})
    saved = optimizer.state_dict()
    assert saved["note"] == 1

    def with_lr(lr):
        def hook(o, sd):
            calls.append(lr)
            sd = copy.deepcopy(sd)
            sd["param_groups"][0]["lr"] = lr
            return sd

        return hook

    optimizer.register_load_state_dict_pre_hook(with_lr(0.125))
    optimizer.register_load_state_dict_pre_hook(with_lr(0.25), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(saved)
    assert calls == ["save", 0.25, 0.125, "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.125


@every_input
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_tensor_lr_is_lr(target, entry, dims):
    """A tensor of one element, whatever its shape, beside a float; refilled on the way."""
    kwargs = kwargs_of(entry)
    lr = float(kwargs.pop("lr", 1e-3))
    kwargs.pop("betas", None)  # torch asks for floats, or tensors, as both
    params = parameters(SHAPES, device=target.device)
    copies = twins(params)
    tensor = torch.tensor(lr).reshape((1,) * dims)
    ours = target.adamw(params, lr=tensor, **kwargs)
    plain = target.adamw(copies, lr=tensor.item(), **kwargs)
    assert ours.param_groups[0]["lr"] is tensor
    for new in (lr, lr / 3):
        tensor.fill_(new)
        plain.param_groups[0]["lr"] = tensor.item()
        train([(ours, params), (plain, copies)], 1)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@every_input
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_is_two_reals(target, entry, dtype):
    real = parameters([(5, 2)], dtype=dtype.to_real(), device=target.device)
    params = [nn.Parameter(torch.view_as_complex(real[0].detach().clone()))]
    optimizers = [target.adamw(p, **kwargs_of(entry)) for p in (real, params)]
    for step in range(steps_of(target)):
        give_grads(real, step)
        params[0].grad = torch.view_as_complex(real[0].grad.clone())
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.view_as_real(params[0].detach()), real[0].detach())


@every_input
def test_mixed_dtypes(target, entry):
    params = [
        p
        for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for p in parameters([(7,)], dtype=dtype, device=target.device)
    ]
    together = twins(params)
    alone = [target.adamw([p], eps=1e-4, **kwargs_of(entry)) for p in params]
    optimizer = target.adamw(together, eps=1e-4, **kwargs_of(entry))
    for step in range(2):
        for p, one in zip(params, alone, strict=True):
            give_grads([p], step)
            one.step()
        for p, q in zip(params, together, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, together, strict=True))


@every_input
def test_gradients_are_never_written(target, entry):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1e-3, **kwargs_of(entry))
    for step in range(2):
        give_grads(params, step)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        optimizer.step()
        for p, (grad, value, version) in zip(params, before, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version


@every_input
def test_overflow_under_a_scaler(target, entry):
    optimizer, params = trained(target, entry)
    before = snapshot(optimizer)
    give_grads(params, 7)
    params[0].grad[0] = math.inf
    scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
    scaler.scale(torch.ones((), device=target.device))
    scaler.step(optimizer)
    scaler.update()
    assert unchanged_since(optimizer, before)
    assert scaler.get_scale() == 2.0


@every_input
def test_can_be_printed(entry):
    ours, theirs = (
        repr(make(parameters(SHAPES), **kwargs_of(entry))) for make in (NATIVE.adamw, torch.optim.AdamW)
    )
    assert ours == theirs.replace("AdamW", "FusedHygieneAdamW")
