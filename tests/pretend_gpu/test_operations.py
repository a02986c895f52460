"""What a step asks of the GPU: launches, copies, synchronisations. Seen in the log of the pretend GPU."""

import pytest
import torch
from common import Target, give_grads, parameters

from fused_adamw import EMA, SpikeGuard
from pretend_gpu import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_active, reason="needs the pretend GPU: make test-pretend-gpu"),
]

NATIVE = Target("native", "cuda")
NORM, UPDATE = "launch norm", "launch update"
UPLOAD = "copy pinned to device"


def asked(optimizer, step=None):
    """The operations of one step, without sizes, and without what happens on the host alone."""
    with device.operations() as operations:
        (step or optimizer.step)()
    kinds = []
    for operation in operations:
        if "NormArgs" in operation:
            kinds.append(NORM)
        elif "UpdateParams" in operation:
            kinds.append(UPDATE)
        elif not operation.startswith(("allocate", "event")):  # pinned memory, and when it is free again
            kinds.append(" ".join(word for word in operation.split() if not word.isdigit()))
    return kinds


def stepped(n_groups=1, **options):
    """An optimizer that has taken two steps on a few tensors, so that nothing is new to it."""
    groups = [
        {"params": parameters([(70,), (5, 5)], seed=i, device="cuda"), "lr": 1e-3} for i in range(n_groups)
    ]
    optimizer = NATIVE.adamw(groups, **options)
    move_gradients(optimizer, 0)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    return optimizer


def move_gradients(optimizer, step):
    give_grads([p for group in optimizer.param_groups for p in group["params"]], step)


BESIDES = {"ema": EMA(decay=0.9), "guard": SpikeGuard(), "stats": True}

with_and_without_clip = pytest.mark.parametrize(
    ("options", "launches"),
    [({"max_grad_norm": 0.5}, [NORM, UPDATE]), ({}, [UPDATE]), (BESIDES, [NORM, UPDATE])],
    ids=["clip", "no clip", "with all besides"],
)


@with_and_without_clip
@pytest.mark.parametrize("n_groups", [1, 70])
def test_a_steady_step_launches_and_no_more(options, launches, n_groups):
    optimizer = stepped(n_groups, **options)
    assert asked(optimizer) == launches


@with_and_without_clip
def test_moved_gradients_take_one_copy(options, launches):
    optimizer = stepped(**options)
    for step in (1, 2):
        kept = [p.grad for group in optimizer.param_groups for p in group["params"]]
        move_gradients(optimizer, step)
        assert asked(optimizer) == [UPLOAD, *launches]
        del kept


def test_the_norms_of_all_parameters_take_two_copies():
    """Of the status, and of what the norm pass left; however often a dictionary for a logger needs them."""
    optimizer = stepped(n_groups=3, max_grad_norm=0.5)
    copy = "copy device to pageable"
    asked_for = [kind for kind in asked(optimizer, optimizer.param_stats) if "synchronize" not in kind]
    assert asked_for == [copy, copy]
    assert asked(optimizer, optimizer.log_dict).count(copy) == 2


@with_and_without_clip
def test_a_new_lr_takes_nothing(options, launches):
    """It travels in the kernel's arguments; with more groups than these hold, in one copy."""
    for n_groups, copies in ((1, []), (60, []), (61, [UPLOAD])):
        optimizer = stepped(n_groups, **options)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        assert asked(optimizer) == copies + launches


def test_a_tensor_lr_that_is_filled_in_place_takes_nothing():
    optimizer = stepped()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(1e-3, device="cuda")
    optimizer.step()
    lr.fill_(1e-4)
    assert asked(optimizer) == [UPDATE]


@pytest.mark.parametrize("value", [1024.0, torch.tensor(1024.0)], ids=["float", "cpu tensor"])
def test_a_loss_scale_of_the_host_is_not_waited_for(value):
    optimizer = stepped(max_grad_norm=0.5)
    optimizer.grad_scale = value
    assert asked(optimizer) == [NORM, "operator aten::full", UPDATE]


def test_a_loss_scale_of_the_gpu_takes_nothing():
    optimizer = stepped(max_grad_norm=0.5)
    optimizer.grad_scale = torch.tensor(1024.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    assert asked(optimizer) == [NORM, UPDATE]


def test_the_first_step_waits_for_nothing():
    """State and tables are allocated and filled by the GPU, however many parameters there are."""
    optimizer = NATIVE.adamw(parameters([(3,)] * 20, device="cuda"), max_grad_norm=0.5)
    move_gradients(optimizer, 0)
    operations = asked(optimizer)
    assert not [
        operation for operation in operations if "pageable" in operation or "synchronize" in operation
    ]
    assert operations[-2:] == [NORM, UPDATE]


def test_a_replay_launches_what_was_captured():
    """From gradients that had not moved: without a copy."""
    optimizer = stepped(max_grad_norm=0.5, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert asked(optimizer, graph.replay) == ["replay", NORM, UPDATE]
