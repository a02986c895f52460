"""CUDA graphs: what is refused, and that replays are steps. Only the refusals can be seen without a GPU."""

import types

import pytest
import torch
from common import NATIVE, TARGETS, give_grads, parameters, snapshot, twins, unchanged_since

from fused_adamw import optimizer as optimizer_module

SHAPES = [(70,), (5, 5)]
on_gpu = pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].device == "cuda"])
pytestmark = pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")


@pytest.fixture
def capturing(monkeypatch):
    """Lets torch believe that there is a GPU and that it captures: whichever way it asks."""
    stream = types.SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    for asked in (torch.backends.cuda, "is_built"), (torch.cuda, "is_available"):  # torch 2.10, 2.11
        monkeypatch.setattr(*asked, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_capture_is_refused_without_capturable(capturing):
    """With torch's message, before the closure runs."""
    params = parameters(SHAPES)
    optimizer = NATIVE.adamw(params)
    give_grads(params, 0)
    with pytest.raises(
        RuntimeError, match=r"graph capture of step\(\) for an instance of FusedHygieneAdamW but"
    ):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    assert not optimizer.state
    for group in optimizer.param_groups:
        group["capturable"] = True
    optimizer.step()


def test_capture_needs_a_step_before_it(monkeypatch):
    """State and tables would live in the pool of the graph. With them in place, it may be captured."""
    params = parameters(SHAPES)
    optimizer = NATIVE.adamw(params, capturable=True)
    for step, is_captured in enumerate((True, False, True)):
        give_grads(params, step)
        before = snapshot(optimizer)
        monkeypatch.setattr(optimizer_module, "is_capturing", lambda device, now=is_captured: now)
        if optimizer.state or not is_captured:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="a step without capture first"):
                optimizer.step()
            assert unchanged_since(optimizer, before)
    assert optimizer.state[params[0]]["step"].item() == 2


def refill(params, step):
    """Give new gradients in the memory of the old ones, as a captured backward does."""
    kept = [p.grad for p in params]
    give_grads(params, step)
    for p, grad in zip(params, kept, strict=True):
        if grad is not None:
            p.grad = grad.copy_(p.grad)


@on_gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_replays_are_steps(target, options, tensor_lr):
    """Bit for bit; they follow a tensor lr, not a float."""
    results = []
    for captured in (True, False):
        params = parameters(SHAPES, device=target.device)
        lr = torch.tensor(1e-2, device=target.device) if tensor_lr else 1e-2
        optimizer = target.adamw(params, lr=lr, capturable=True, **options)
        refill(params, 0)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            before = snapshot(optimizer)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
            torch.cuda.synchronize()
            assert unchanged_since(optimizer, before)
        for step in range(1, 5):
            refill(params, step)
            if tensor_lr:
                lr.mul_(0.5)
            elif captured:
                optimizer.param_groups[0]["lr"] = 0.5
            if step == 3 and "skip_nonfinite" in options:
                params[0].grad[3] = torch.inf
            graph.replay() if captured else optimizer.step()
        results.append((optimizer, params))
    (optimizer, params), (plain, copies) = results
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    for p, q in zip(params, copies, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in plain.state[q].items())
    assert optimizer.skipped_steps.item() == plain.skipped_steps.item() == ("skip_nonfinite" in options)
    if options:
        assert torch.equal(optimizer.grad_norm, plain.grad_norm)


@on_gpu
def test_an_eager_step_between_replays(target):
    """With gradients elsewhere: it does not change what the graph reads."""
    params = parameters(SHAPES, device=target.device)
    copies = twins(params)
    optimizer, plain = target.adamw(params, capturable=True), target.adamw(copies)
    refill(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    captured = [p.grad for p in params]
    for step in (1, 2, 3):
        if step == 2:
            give_grads(params, step)
            optimizer.step()
            for p, grad in zip(params, captured, strict=True):
                p.grad = grad
        else:
            refill(params, step)
            graph.replay()
    for step in range(4):
        give_grads(copies, step)
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capturable", [False, True])
def test_a_capture_that_is_refused_leaves_the_optimizer_usable(capturable):
    params = parameters(SHAPES, device="cuda")
    optimizer = optimizer_module.FusedHygieneAdamW(params, capturable=capturable)
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 1
