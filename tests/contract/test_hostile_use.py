"""What users do to an optimizer and its tensors from outside: as in torch, or refused before a step."""

import copy
import fractions
import threading
import warnings

import numpy as np
import pytest
import torch
from common import assert_same_path, give_grads, parameters, snapshot, twins, unchanged_since
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(autouse=True)
def warn_always():
    """Torch gives some warnings once in a process, to whichever test comes first."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def steps(optimizer, params, n=2, first=0):
    for step in range(first, first + n):
        give_grads(params, step)
        optimizer.step()


def both(target, act, make_params=None, **options):
    """Let `act(optimizer, params)` train ours and torch's; compare the parameters."""
    params = parameters([(4, 3), (5,), ()], device=target.device) if make_params is None else make_params()
    peers = twins(params) if make_params is None else make_params()
    theirs = torch.optim.AdamW(peers, foreach=False, **options)
    act(theirs, peers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act(target.adamw(params, **options), params)
    assert_same_path(
        [p.detach().as_subclass(torch.Tensor) for p in params],
        [p.detach().as_subclass(torch.Tensor) for p in peers],
        8,
    )


# Tensors that share memory, or stand for others


def test_copies_that_are_made_when_something_is_written(target):
    """A lazy clone shares memory with its tensor until either is written to, which a kernel does unseen."""
    (p,) = parameters([(5,)], device=target.device)
    optimizer = target.adamw([p])
    steps(optimizer, [p], 2)
    tensors = [p.detach(), *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step"))]
    kept = [t.clone() for t in tensors]
    copies = [torch._lazy_clone(t) for t in tensors]
    steps(optimizer, [p], 1, first=2)
    assert all(torch.equal(copy, value) for copy, value in zip(copies, kept, strict=True))
    assert not any(torch.equal(t, value) for t, value in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("part", [slice(0, 40_000), slice(10_000, 30_000)], ids=["whole", "part"])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(target, part):
    """Tied through `.data`: two rows at the same time would lose updates."""
    results = []
    for make in (lambda p: target.adamw(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)):
        first, other, last = parameters([(40_000,), (7,), (1,)], device=target.device)
        last.data = first.data[part]
        optimizer = make([first, other, last])
        steps(optimizer, [first, other, last], 3)
        results.append(first)
        if type(optimizer) is not torch.optim.AdamW and target.backend != "reference":
            assert optimizer._plan.fallbacks == dict.fromkeys(
                (0, 2), "parameter shares memory with another one"
            )
    assert_same_path(results[:1], results[1:], 6)


def test_neighbours_in_one_buffer_share_nothing(target):
    flat = torch.zeros(10, device=target.device)
    params = [nn.Parameter(flat[:4]), nn.Parameter(flat[4:4]), nn.Parameter(flat[4:])]
    optimizer = target.adamw(params)
    steps(optimizer, params)
    assert not optimizer._plan.fallbacks


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("where", ["given", "in its group", "in another group"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_parameter_listed_twice(target, where, amsgrad):
    """As chained lists of modules with tied weights have it: stepped twice, as in torch's for-loop."""
    pairs = []
    for make in (target.adamw, lambda *args, **options: torch.optim.AdamW(*args, foreach=False, **options)):
        first, other = parameters([(4,), (5,)], device=target.device)
        given = [first, other, first] if where == "given" else [first, other]
        optimizer = make(given, lr=1e-2, weight_decay=0.1, amsgrad=amsgrad)
        if where == "in its group":
            optimizer.param_groups[0]["params"].append(first)
        elif where == "in another group":
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": [first], "lr": 1e-3})
        pairs.append((optimizer, [first, other]))
    for step in range(3):
        for optimizer, params in pairs:
            give_grads(params, step)
            optimizer.step()
    (ours, params), (theirs, peers) = pairs
    assert_same_path(params, peers, 6)
    assert [ours.state[p]["step"].item() for p in params] == [6, 3]
    assert ours.state_dict()["param_groups"][0]["params"] == theirs.state_dict()["param_groups"][0]["params"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_counts_once_in_the_norm(target):
    """As in `clip_grad_norm_(model.parameters())`."""
    params = parameters([(4,), (5,)], device=target.device)
    optimizer = target.adamw([*params, params[0]], max_grad_norm=1.0)
    give_grads(params, 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)


@pytest.mark.parametrize("what", ["parameter", "exp_avg"])
@pytest.mark.parametrize("view", ["an expanded", "a conjugate"])
def test_what_cannot_be_written_is_refused_before_the_others_are_stepped(target, what, view):
    dtype = torch.complex64 if view == "a conjugate" else torch.float32
    values = torch.ones(3, dtype=dtype, device=target.device)
    odd = values.conj() if view == "a conjugate" else values[:1].expand(3)
    p = nn.Parameter(odd if what == "parameter" else values)
    params = [*parameters([(4,)], device=target.device), p]
    optimizer = target.adamw(params)
    for x in params:
        x.grad = torch.ones_like(x)
    if what == "exp_avg":
        optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": odd, "exp_avg_sq": values.clone()}
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{what}.* number 1 of group 0 .*it is {view} view. Clone it"):
        optimizer.step()
    assert unchanged_since(optimizer, before)


@pytest.mark.parametrize(
    ("param", "other", "expected"),
    [(torch.float32, torch.complex64, "floating point"), (torch.complex64, torch.float32, "complex")],
)
@pytest.mark.parametrize("what", ["gradient", "exp_avg"])
def test_complex_beside_real_is_refused(target, what, param, other, expected):
    """Imaginary parts would be dropped."""
    p = nn.Parameter(torch.ones(3, dtype=param, device=target.device))
    p.grad_dtype = None
    params = [*parameters([(4,)], device=target.device), p]
    optimizer = target.adamw(params)
    for step in range(2):
        for x in params:
            x.grad = torch.full_like(x, step + 1.0)
        if step == 0:
            optimizer.step()
    if what == "gradient":
        p.grad = torch.ones_like(p, dtype=other)
    else:
        optimizer.state[p]["exp_avg"] = torch.ones_like(p, dtype=other)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{what} .* is a tensor of {other}, expected a {expected} tensor"):
        optimizer.step()
    assert unchanged_since(optimizer, before)


def test_conjugate_gradients(target):
    """Autograd may hand them out as views, which torch's AdamW cannot read."""
    results = []
    for resolve in (False, True):
        p = nn.Parameter(torch.full((3,), 1 + 2j, device=target.device))
        p.grad = torch.full((3,), 3 + 4j, device=target.device).conj()
        assert p.grad.is_conj()
        if resolve:
            p.grad = p.grad.resolve_conj()
        optimizer = target.adamw([p], max_grad_norm=1.0)
        optimizer.step()
        results.append(p)
    assert torch.equal(*results)


class Wrapped(torch.Tensor):
    """A subclass that does nothing but be one."""


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_subclasses(target, which):
    def make():
        params = parameters([(4, 3), (5,)], device=target.device)
        return [nn.Parameter(p.data.as_subclass(Wrapped)) for p in params] if which == "parameter" else params

    def act(optimizer, params):
        for step in range(3):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.as_subclass(Wrapped) if which == "gradient" else p.grad
            optimizer.step()

    both(target, act, make)


# Models that change under the optimizer


def test_swap_tensors(target):
    def act(optimizer, params):
        steps(optimizer, params)
        params[0].grad = None
        torch.utils.swap_tensors(params[0], nn.Parameter(torch.ones_like(params[0])))
        steps(optimizer, params, first=2)

    both(target, act)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_converted_after_steps_goes_on_with_the_moments_it_had(target, dtype, swap):
    """Where torch raises: the moments stay float32."""
    model = nn.Linear(3, 4).to(target.device)
    optimizer = target.adamw(model.parameters())
    steps(optimizer, list(model.parameters()))
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    steps(optimizer, list(model.parameters()), first=2)
    for p in model.parameters():
        assert p.dtype == dtype
        assert optimizer.state[p]["step"].item() == 4
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_storage_freed_and_back(target):
    """As FSDP does between steps."""

    def act(optimizer, params):
        steps(optimizer, params)
        storage = params[0].untyped_storage()
        size = storage.size()
        params[0].grad = None
        storage.resize_(0)
        steps(optimizer, params[1:], first=2)
        storage.resize_(size)
        params[0].data.fill_(1.0)
        steps(optimizer, params, first=4)

    both(target, act)


# Numbers of other kinds


@pytest.mark.parametrize(
    "lr",
    [
        np.float64(1e-2),
        np.float32(1e-2),
        fractions.Fraction(1, 100),
        1,
        torch.tensor([1e-2]),
        torch.tensor(1e-2, dtype=torch.float64),
        torch.tensor(1e-2, requires_grad=True),
    ],
    ids=repr,
)
def test_learning_rates_of_any_kind(target, lr):
    def act(optimizer, params):
        steps(optimizer, params)
        optimizer.param_groups[0]["lr"] = lr
        steps(optimizer, params, first=2)

    both(target, act, lr=lr)


# Modes


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        Functions,
        Operators,
        lambda: FlopCounterMode(display=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.enable_grad,
    ],
    ids=["function", "dispatch", "flops", "autocast", "anomaly", "device", "inference", "grad"],
)
def test_modes(target, mode):
    """Entered and left between steps."""

    def act(optimizer, params):
        steps(optimizer, params)
        give_grads(params, 2)
        with mode():
            optimizer.step()
        steps(optimizer, params, first=3)

    both(target, act)


@pytest.mark.parametrize("first", [0, 2], ids=["the first step", "a later step"])
def test_what_is_made_in_inference_mode_is_used_after_it(target, first):
    """State and tables; torch, too, cannot go on from a state that was made there."""
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        params = parameters([(4, 3), (5,)], device=target.device)
        optimizer = target.adamw(params, max_grad_norm=1.0)
        steps(optimizer, params, first)
        optimizer.state.update({p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()})
        give_grads(params, first)
        with mode():
            optimizer.step()
        steps(optimizer, params, first=first + 1)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def with_one_for_the_reference(target):
    """A parameter that kernels step, and one with holes."""
    (p,) = parameters([(4,)], device=target.device)
    return [p, nn.Parameter(torch.ones(8, device=target.device)[::2])]


@pytest.mark.parametrize("what", ["parameter", "step", "exp_avg"])
def test_what_was_made_in_inference_mode_is_written_there_only(target, what):
    """Torch, too, refuses it elsewhere, but after it has stepped the parameters before it."""
    params = with_one_for_the_reference(target)
    with torch.inference_mode():
        if what == "parameter":
            params[1] = nn.Parameter(params[1].clone())
        optimizer = target.adamw(params)
        steps(optimizer, params)
        if what != "parameter":
            state = optimizer.state[params[1]]
            state[what] = state[what].clone()
        steps(optimizer, params)
    optimizer.state[params[0]] = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{what}.* number 1 of .*it was made in inference mode. Clone it"):
        optimizer.step()
    assert unchanged_since(optimizer, before)


def test_a_state_loaded_in_inference_mode_is_used_after_it(target):
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        params = with_one_for_the_reference(target)
        optimizer = target.adamw(params)
        steps(optimizer, params)
        saved = copy.deepcopy(optimizer.state_dict())
        with mode():
            optimizer.load_state_dict(saved)
        steps(optimizer, params, first=2)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_deterministic_algorithms(target):
    torch.use_deterministic_algorithms(True)
    try:
        both(target, steps)
    finally:
        torch.use_deterministic_algorithms(False)


def test_optimizers_of_several_threads(target):
    if target.slow:
        pytest.skip("Triton's interpreter runs in one thread")
    params = [parameters([(4, 3), (5,)], device=target.device) for _ in range(4)]
    threads = [threading.Thread(target=steps, args=(target.adamw(p), p)) for p in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = twins(parameters([(4, 3), (5,)], device=target.device))
    steps(target.adamw(alone), alone)
    for p in params:
        assert all(torch.equal(a, b) for a, b in zip(p, alone, strict=True))


# Tensors without memory


def train_linear(make):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = make(model.parameters())
    for _ in range(10):  # as often as a second clip would be looked for
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_without_memory(backend, mode, options):
    """As tools that estimate memory and time do: by the reference; the state is as the parameters are."""
    from fused_adamw import FusedHygieneAdamW

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mode():
            optimizer = train_linear(lambda p: FusedHygieneAdamW(p, backend=backend, **options))
    peer = train_linear(torch.optim.AdamW)  # with memory: torch 2.10 cannot step meta tensors
    params = optimizer.param_groups[0]["params"]
    for p, q in zip(params, peer.param_groups[0]["params"], strict=True):
        assert optimizer.state[p].keys() == peer.state[q].keys()
        for key, value in peer.state[q].items():
            ours = optimizer.state[p][key]
            assert (ours.shape, ours.dtype) == (value.shape, value.dtype)
            assert ours.device == p.device
            assert isinstance(ours, FakeTensor) == isinstance(p, FakeTensor)
    assert (optimizer.grad_norm is None) == (not options)


def test_a_fake_step_leaves_real_optimizers_alone(target):
    params = parameters([(4, 3)], device=target.device)
    copies = twins(params)
    optimizer, plain = target.adamw(params), target.adamw(copies)
    steps(optimizer, params)
    steps(plain, copies)
    with FakeTensorMode():
        fake = parameters([(4, 3)])
        steps(target.adamw(fake), fake)
    steps(optimizer, params, first=2)
    steps(plain, copies, first=2)
    assert torch.equal(params[0], copies[0])
