"""CUDA graphs: what is refused, and that replays are steps. Only the refusals can be seen without a GPU."""

import gc
import types

import pytest
import torch
from common import (
    NATIVE,
    TARGETS,
    Target,
    give_grads,
    parameters,
    randn,
    snapshot,
    twins,
    unchanged_since,
)

from fused_adamw import EMA, FusedHygieneAdamW, SpikeGuard, stepping
from fused_adamw.step import launch, plan

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
    monkeypatch.setattr(stepping, "has_graphs", lambda: True)  # known already where others have stepped


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
        monkeypatch.setattr(stepping, "is_capturing", lambda device, now=is_captured: now)
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


BESIDES = {
    "ema": EMA(decay=0.9, warmup="timm"),
    "guard": SpikeGuard(sigmas=1.0, window=3, warmup=2),
    "stats": True,
    "skip_nonfinite": True,
}


@on_gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}, BESIDES], ids=str)
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
        assert optimizer.param_stats() == plain.param_stats()


@on_gpu
@pytest.mark.parametrize("order", ["captured", "with steps between replays", "captured twice"])
def test_replays_copy_gradients_of_another_layout_anew(target, order):
    """Beside complex parameters; the copies of a capture are in the memory of its graph."""

    def transposed(grad):
        return grad.t().contiguous().t()

    results = []
    for captured in (True, False):
        params = parameters([(6, 5), (40, 30), (9,)], device=target.device)
        params += parameters([(7, 3)], device=target.device, dtype=torch.complex64)
        optimizer = target.adamw(params, lr=1e-2, max_grad_norm=0.5, capturable=True)
        for i, p in enumerate(params):
            p.grad = transposed(torch.zeros_like(p)) if i % 2 else torch.zeros_like(p)
        graphs, held = [torch.cuda.CUDAGraph() for _ in range(2)], []
        for step in range(8):
            for i, p in enumerate(params):
                unit = 1 - 2j if p.is_complex() else 1
                p.grad.copy_(unit * randn(*p.shape, seed=10 * step + i))
            held.append(torch.full((40, 30), torch.nan, device=target.device))  # where a copy may have been
            if captured and step in ((1, 4) if order == "captured twice" else (1,)):
                graph = graphs[step == 4]
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            is_replay = captured and step and (order == "captured" or step % 3)
            if is_replay:
                graph.replay()
            else:
                optimizer.step()
        assert len(optimizer._plan.copies.layouts) == (0 if target.backend == "reference" else 2)
        results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Twins:
    """The same steps on a GPU, by an optimizer that may capture them, and without any capture on copies."""

    def __init__(self, target, n_groups=1, **options):
        self.params = parameters(SHAPES * n_groups, device=target.device)
        self.copies = twins(self.params)
        cut = len(SHAPES)
        groups = [range(i, i + cut) for i in range(0, len(self.params), cut)]
        self.optimizer, self.plain = (
            target.adamw([{"params": [params[i] for i in g]} for g in groups], capturable=True, **options)
            for params in (self.params, self.copies)
        )

    def give(self, step):
        """New gradients in new memory, on both sides."""
        give_grads(self.params, step)
        give_grads(self.copies, step)

    def eager(self):
        self.optimizer.step()
        self.plain.step()

    def capture(self):
        """A graph of one step, and the gradients that it reads; nothing is stepped."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        return graph, [p.grad for p in self.params]

    def replay(self, graph, grads):
        """Replay a graph; the other side takes the step that it holds."""
        others = overwritten_memory()
        graph.replay()
        before = [q.grad for q in self.copies]
        for q, grad in zip(self.copies, grads, strict=True):
            q.grad = grad
        self.plain.step()
        for q, grad in zip(self.copies, before, strict=True):
            q.grad = grad
        assert all((other == 7).all() for other in others)

    def assert_equal(self):
        torch.cuda.synchronize()
        for p, q in zip(self.params, self.copies, strict=True):
            assert torch.equal(p, q)
            state, expected = self.optimizer.state[p], self.plain.state[q]
            assert all(torch.equal(state[key], value) for key, value in expected.items())


def overwritten_memory():
    """Tensors that take whatever small memory was freed."""
    return [torch.full((n,), 7.0, device="cuda") for n in (2, 16, 64, 512) for _ in range(8)]


# With one table of hypers in kernel arguments, and one on the device.
few_and_many_groups = pytest.mark.parametrize("n_groups", [1, 70])


@on_gpu
@few_and_many_groups
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_an_eager_step_between_replays(target, n_groups, max_grad_norm):
    """With gradients elsewhere: the graph keeps the tables that were uploaded before its capture."""
    both = Twins(target, n_groups, max_grad_norm=max_grad_norm)
    both.give(0)
    both.eager()
    graph = both.capture()
    both.replay(*graph)
    both.give(1)
    both.eager()
    both.replay(*graph)
    both.assert_equal()


@on_gpu
@few_and_many_groups
def test_an_eager_step_before_the_first_replay(target, n_groups):
    """It does not read the tables that only a replay fills."""
    both = Twins(target, n_groups, max_grad_norm=0.5)
    both.give(0)
    both.eager()
    both.give(1)
    graph = both.capture()
    both.eager()
    both.assert_equal()
    both.replay(*graph)
    both.assert_equal()


@on_gpu
@few_and_many_groups
def test_a_capture_after_each_eager_step(target, n_groups):
    """Each graph has tables of its own, whether gradients moved or not."""
    both = Twins(target, n_groups, max_grad_norm=0.5)
    graphs = []
    for step in range(3):
        both.give(2 * step)
        both.eager()
        graphs.append(both.capture())
        both.eager()
        both.give(2 * step + 1)
        graphs.append(both.capture())
    for graph in reversed(graphs):
        both.replay(*graph)
    both.assert_equal()


@on_gpu
def test_captures_one_after_the_other(target):
    """Pinned memory is short for more than two: the refusal says what to do, and it helps."""
    both = Twins(target)
    both.give(0)
    both.eager()
    graphs = [both.capture()]  # of the tables that are there
    both.give(1)
    graphs.append(both.capture())  # uploads its own
    if target.backend != "reference":
        with pytest.raises(RuntimeError, match="without capture before each capture"):
            both.capture()
    both.eager()
    both.give(2)
    graphs.append(both.capture())
    for graph in graphs:
        both.replay(*graph)
    both.assert_equal()


@on_gpu
def test_a_plan_that_is_replaced_after_its_capture(target):
    """Its graph goes on to step the parameters that it knew."""
    both = Twins(target, max_grad_norm=0.5)
    both.give(0)
    both.eager()
    graph = both.capture()
    for optimizer in (both.optimizer, both.plain):
        (extra,) = parameters([(3,)], seed=1, device="cuda")
        optimizer.add_param_group({"params": [extra]})
    both.give(1)
    both.eager()
    gc.collect()
    both.replay(*graph)
    both.assert_equal()


def test_a_captured_step_leaves_its_tables_to_the_graph(monkeypatch):
    """The next step writes its own, captured or not, though nothing has moved."""
    monkeypatch.setattr(plan, "is_gpu", lambda device: True)
    params = parameters(SHAPES)
    optimizer = NATIVE.adamw(params, capturable=True)
    give_grads(params, 0)
    written = []

    def spy(name):
        real = getattr(launch.TableBucket, name)

        def method(*args):
            written.append(name)
            return real(*args)

        monkeypatch.setattr(launch.TableBucket, name, method)

    spy("set_grads")
    spy("set_hypers")
    found = []
    for is_captured in (False, False, True, False, False, True, True, False):
        for module in (stepping, plan):
            monkeypatch.setattr(module, "is_capturing", lambda device, now=is_captured: now)
        optimizer.step()
        found.append(len(written))
        written.clear()
    # On a CPU the second step takes over the table that the guard writes in place.
    assert found == [2, 1, 0, 2, 0, 0, 2, 2]


def test_a_capture_does_not_compile(monkeypatch):
    """Triton's kernels: the step to run before is one that launches the same ones."""
    backend = pytest.importorskip("fused_adamw.backends.triton", exc_type=ImportError)
    if backend.unavailable_reason(torch.device("cpu")):
        pytest.skip("needs Triton's interpreter")
    params = parameters(SHAPES)
    optimizer = Target("triton", "cpu").adamw(params)
    monkeypatch.setattr(backend, "_launched", set())
    give_grads(params, 0)
    optimizer.step()
    optimizer.max_grad_norm = 0.5
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="without capture first, with max_grad_norm"):
        optimizer.step()
    assert unchanged_since(optimizer, before)
    monkeypatch.setattr(backend, "is_capturing", lambda device: False)
    optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capturable", [False, True])
def test_a_capture_that_is_refused_leaves_the_optimizer_usable(capturable):
    params = parameters(SHAPES, device="cuda")
    optimizer = FusedHygieneAdamW(params, capturable=capturable)
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 1
