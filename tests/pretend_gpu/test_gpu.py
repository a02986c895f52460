"""The pretend GPU itself: late streams, captures, memory in use, several devices."""

import pytest
import torch
from common import Target, give_grads, parameters

from pretend_gpu import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_active, reason="needs the pretend GPU: make test-pretend-gpu"),
]

NATIVE = Target("native", "cuda")


def filled(value):
    return torch.full((8,), value).pin_memory()


def test_work_is_done_when_it_is_waited_for():
    """A copy that was not waited for takes what its source holds later."""
    source, target = filled(1.0), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    target.copy_(source, non_blocking=True)
    source.fill_(2.0)
    assert target.tolist() == [2.0] * 8
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    source.fill_(3.0)
    assert target.tolist() == [2.0] * 8


def test_a_stream_runs_as_far_as_an_event_that_is_waited_for():
    source, target = filled(1.0), torch.zeros(2, 8, device="cuda")
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        target[0].copy_(source, non_blocking=True)
        event.record()
        target[1].copy_(source, non_blocking=True)
    event.synchronize()
    assert event.query()
    assert not stream.query()
    source.fill_(2.0)
    stream.synchronize()
    assert target.tolist() == [[1.0] * 8, [2.0] * 8]


@pytest.mark.parametrize("what", ["pageable", "pinned", "wait", "read"])
def test_what_a_capture_forbids(what):
    x = torch.zeros(8, device="cuda")
    forbidden = {
        "pageable": lambda: x.copy_(torch.ones(8)),
        "pinned": lambda: torch.ones(1 << 22).pin_memory(),  # more than the allocator has in reserve
        "wait": torch.cuda.synchronize,
        "read": lambda: x.sum().item(),
    }
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden[what]()
    torch.cuda.synchronize()
    assert x.tolist() == [0.0] * 8


def test_a_graph_repeats_what_it_captured():
    x, y = torch.zeros(8, device="cuda"), torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = x + y
        x.add_(z)
    assert x.tolist() == [0.0] * 8
    for expected in (1.0, 3.0, 7.0):
        graph.replay()
        assert x.tolist() == [expected] * 8


def test_memory_is_poisoned():
    x = torch.empty(64, dtype=torch.uint8, device="cuda")
    assert x.tolist() == [0xCD] * 64
    address = x.data_ptr()
    del x
    torch.cuda.synchronize()
    assert device.bytes_at(address, 64) == b"\xdd" * 64


@pytest.mark.parametrize("name", ["rows", "grads", "chunks", "workspace"])
def test_a_kernel_that_reads_a_freed_table_is_an_error(name):
    params = parameters([(70,)], device="cuda")
    optimizer = NATIVE.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    bucket = optimizer._plan.launches[0].bucket
    bucket._parts = []
    before = params[0].detach().clone()
    setattr(bucket._tables, name, device.without_owner(getattr(bucket._tables, name)))
    optimizer.step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.synchronize()
    assert torch.equal(params[0], before)


def test_devices_are_apart():
    assert torch.cuda.device_count() == 2
    for index in range(2):
        params = parameters([(70,)], device=f"cuda:{index}")
        optimizer = NATIVE.adamw(params, max_grad_norm=0.5)
        give_grads(params, 0)
        optimizer.step()
        assert params[0].device.index == index
        assert optimizer.grad_norm.device.index == index


LOW_PRECISION = [
    {"master_weights": "split"},
    {"master_weights": "split", "state_dtype": torch.bfloat16},
    {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    {"master_weights": "split", "state_dtype": "8bit"},
    {"stochastic_rounding": True, "state_dtype": "8bit"},
]


def steps(target, **options):
    """All tensors after a few steps, one of them skipped."""
    shapes = [(40, 144), (16, 256), (130, 33), (70,)]
    params = [p.to(torch.bfloat16) for p in parameters(shapes)]
    params = [p.detach().to(target.device).requires_grad_() for p in params]
    optimizer = target.adamw(params, max_grad_norm=0.5, skip_nonfinite=True, **options)
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p)
        if step == 2:
            params[0].grad[0] = float("inf")
        optimizer.step()
    state = [optimizer.state[p] for p in params]
    return [p.detach().cpu() for p in params] + [s[key].cpu() for s in state for key in sorted(s)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", LOW_PRECISION, ids=str)
def test_low_precision_has_the_bits_of_a_cpu(options):
    on_gpu, on_cpu = steps(NATIVE, **options), steps(Target("native", "cpu"), **options)
    assert [t.dtype for t in on_gpu] == [t.dtype for t in on_cpu]
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(ours, theirs)
