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
    bucket._chunks_of = []
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
