"""What went wrong in optimizers and their kernels before, each once. Bare numbers are issues of PyTorch."""

import functools
import re
from pathlib import Path

import pytest
import torch
from common import (
    TARGETS,
    Target,
    assert_same_path,
    give_grads,
    parameters,
    snapshot,
    thin_zeros,
    twins,
    unchanged_since,
)
from torch import nn

from fused_adamw import tables
from fused_adamw.step import launch

TESTS = Path(__file__).parents[1]

# Those that other files guard against.
COVERED = {
    "100701, 109402: trailing empty tensors drop the launch": "test_torch_peer::test_zero_size_tensors",
    "140066: norm of a list with empty tensors": "test_clip::test_norm_skips_missing_and_empty_gradients",
    "110758, 106951, 126585: unequal strides": "test_layouts::test_parameter_and_gradient",
    "a parameter twice in one list is a race": "contract/test_hostile_use::test_a_parameter_listed_twice",
    "FlagGems 4988: the rule of AdamW or of Adam": "test_torch_peer::test_options",
    "bitsandbytes Lion: decay tested at 0 only": "test_torch_peer::test_options",
    "78807: the maximum of amsgrad is not stored": (
        "test_torch_peer::test_amsgrad_keeps_the_maximum_when_gradients_shrink"
    ),
    "104990: complex and amsgrad": "test_torch_peer::test_complex_parameters",
    "torchao 4915: counts stop at 256": "test_state::test_default_dtype_does_not_reach_the_state",
    "118326: a step that is no tensor": "test_state::test_steps_of_any_form",
    "88258, 90752, 95781, 96755, Lightning 15501: unscaled twice": (
        "test_amp::test_the_clipped_norm_is_unscaled"
    ),
    "123428: preset grad_scale is overwritten": "test_amp::test_preset_grad_scale",
    "140514: shape of found_inf": "test_amp::test_found_inf_of_any_shape",
    "46849, DeepSpeed 5242: infinite and NaN norms": "test_clip::test_nonfinite_gradients_as_in_torch",
    "a NaN norm spreads": "test_amp::test_skip_nonfinite",
    "squares beyond float16": "test_clip::test_squares_beyond_float16",
    "103256, 80809: steps on the CPU after loading": "test_state::test_steps_of_any_form",
    "43706, 75224, torchtitan 4615: dtype of a loaded state": (
        "test_state::test_state_dtype_survives_a_checkpoint"
    ),
    "apex 577: a group key of its own": "contract/test_distributed_checkpoint::test_any_into_any",
    "108860: steps of one dimension": "test_state::test_step_is_a_tensor_of_its_own",
    "143828: empty groups in DCP": (
        "contract/test_distributed_checkpoint::test_an_empty_group_keeps_its_options"
    ),
    "tensors replaced in groups": "test_stale_plans::test_parameter_replaced_in_the_group",
    "the same, edited by hand": "contract/test_hostile_use::test_a_parameter_listed_twice",
    "torch-xpu-ops 3413: half a step before an error": "test_errors::test_sparse_gradient",
    "ShardedGradScaler and fused: an overflow in one process": (
        "distributed/test_nonfinite::test_sharded_grad_scaler"
    ),
    "88621, 170862, 180346, torchrec 3199: norms of shards": (
        "distributed/test_dtensor::test_as_in_one_process"
    ),
    "46334, 189245, OpenEquivariance 207: compiling at import": (
        "test_build::test_import_writes_nothing_and_starts_nothing"
    ),
}


@pytest.mark.parametrize("test", COVERED.values(), ids=COVERED.keys())
def test_guarded_elsewhere(test):
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (TESTS / f"{file}.py").read_text(), re.MULTILINE)


def race(target, shapes, steps=2, **options):
    """Train beside torch's for-loop; returns ours and its parameters."""
    params = parameters(shapes, device=target.device)
    peers = twins(params)
    ours = target.adamw(params, **options)
    theirs = torch.optim.AdamW(peers, foreach=False)
    for step in range(steps):
        for optimizer, mine in ((ours, params), (theirs, peers)):
            give_grads(mine, step)
            optimizer.step()
    assert_same_path(params, peers, steps)
    assert all(ours.state[p]["step"].item() == steps for p in params)
    return ours, params


KERNELS = [x for x in TARGETS if x.values[0].backend != "reference"]
# Elements whose position a signed or unsigned 32-bit number has wrong, and those beside them.
FAR = (0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32)


def step_far(target, numel, dtype):
    """Step one parameter, zeros, with gradients of 2 at `FAR` places.

    Returns:
        The parameter and its moments, and the places where each must have changed, and has.
    """
    make = thin_zeros if target.device == "cpu" else functools.partial(torch.zeros, device=target.device)
    p = nn.Parameter(make(numel, dtype=dtype))
    p.grad = make(numel, dtype=dtype)
    places = [place for place in FAR if place < numel]
    p.grad[places] = 2.0
    optimizer = target.adamw([p], lr=0.5, max_grad_norm=1e9)
    optimizer.state[p] = {
        "step": torch.zeros((), device=target.device),
        "exp_avg": make(numel, dtype=dtype),
        "exp_avg_sq": make(numel, dtype=dtype),
    }
    optimizer.step()
    assert not optimizer._plan.fallbacks
    assert optimizer.state[p]["step"].item() == 1
    assert optimizer.grad_norm.item() == pytest.approx((4.0 * len(places)) ** 0.5)
    tensors = [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
    for t, value in zip(tensors, (-0.5, 0.2, 0.004), strict=True):
        assert t[places].tolist() == pytest.approx([value] * len(places), rel=2**-7)
    return tensors, places


@pytest.mark.parametrize("target", [x for x in KERNELS if x.values[0].device == "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_that_32_bits_do_not_hold(target, dtype, monkeypatch):
    """101449, apex 1654, TE 2918: illegal access. The chunks with such positions alone, in thin memory."""

    def far_chunks(numels, size):
        table = tables.chunk_table(numels, size)
        return table[torch.isin(table[:, 1], torch.tensor(FAR) // size)]

    monkeypatch.setattr(launch, "chunk_table", far_chunks)
    tensors, places = step_far(target, 2**32 + 1, dtype)
    for t in tensors:
        for place in places:
            start = max(0, place - 100)
            changed = start + t[start : place + 100].nonzero().squeeze(1)
            assert changed.tolist() == [x for x in places if abs(x - place) <= 100]


def free_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    (line,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(line)


@pytest.mark.large
@pytest.mark.parametrize("target", [x for x in KERNELS if not x.values[0].slow])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [2**31 + 1, 2**32 + 1], ids=["beyond int32", "beyond uint32"])
def test_more_elements_than_32_bits_count(target, numel, dtype):
    """As above, and DeepSpeed 7640, no update at all, in silence: every element in memory of its own."""
    tensors = 3 if target.device == "cpu" else 4  # gradients of zero are not written
    needed = tensors * numel * dtype.itemsize + 2**30
    if free_memory(target.device) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB, {free_memory(target.device) / 2**30:.0f} are free")
    tensors, places = step_far(target, numel, dtype)
    for t in tensors:
        assert t.count_nonzero().item() == len(places)


def test_a_thousand_empty_tensors(target):
    """94865: they overran a table on the stack."""
    ours, _ = race(target, [(5,), *[(0,)] * (20 if target.slow else 1000), (6,)], max_grad_norm=1e9)
    assert ours.grad_norm.item() > 0


def test_empty_tensors_at_the_ends_of_tables(target):
    """TE 3202, 3207: an empty tensor in the last slot of a launch wrote past it."""
    empty = {23, 29, 35, 47, 63, 109}
    race(target, [(0,) if i in empty else (3,) for i in range(150)], steps=1)


@pytest.mark.parametrize("chunk", [2**13, 2**14, 2**15, 2**16])
def test_sizes_around_a_chunk(target, chunk):
    """The last elements of a chunk, and the only one of another."""
    race(target, [(chunk - 1,), (chunk,), (chunk + 1,)], steps=1)


def test_an_empty_group_gets_parameters_later(target):
    """TE 1986: the step of the group had not counted, or counted without them."""
    (p,), (q,) = parameters([(3,)], device=target.device), parameters([(3,)], seed=1, device=target.device)
    peers = twins([p, q])
    optimizers = [
        target.adamw([{"params": []}, {"params": [p]}]),
        torch.optim.AdamW([{"params": []}, {"params": peers[:1]}]),
    ]
    for step in range(4):
        if step == 2:
            for optimizer, late in zip(optimizers, (q, peers[1]), strict=True):
                optimizer.param_groups[0]["params"].append(late)
        for optimizer, mine in zip(optimizers, ([p, q], peers), strict=True):
            give_grads(mine[: 1 + (step >= 2)], step)
            optimizer.step()
    assert_same_path([p, q], peers, 4)
    assert [optimizers[0].state[x]["step"].item() for x in (p, q)] == [4, 2]


def test_an_empty_group_in_a_checkpoint_of_other_shards(target):
    """TE 1986: a rank whose group was empty when it was saved."""
    optimizer = target.adamw(
        [{"params": [], "lr": 0.5}, {"params": parameters([(3,)], device=target.device)}]
    )
    give_grads(optimizer.param_groups[1]["params"], 0)
    optimizer.step()
    resumed = target.adamw([{"params": []}, {"params": parameters([(3,)], device=target.device)}])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.5
    give_grads(resumed.param_groups[1]["params"], 0)
    resumed.step()


def test_a_scheduler_can_tell_skipped_steps(target):
    """Accelerate 4242, Lightning 18828: step() is called for skipped steps, too; the counter tells."""
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler(target.device, init_scale=4.0)
    lrs = []
    for step, spoiled in enumerate([False, True, True, False]):
        scaler.scale(params[0].sum())
        give_grads(params, step)
        if spoiled:
            params[0].grad[0] = torch.inf
        skipped, state = optimizer.skipped_steps, snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if torch.equal(optimizer.skipped_steps.cpu(), skipped.cpu()):
            scheduler.step()
        else:
            assert unchanged_since(optimizer, state)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx([1e-4, 1e-4, 1e-4, 1e-5])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_another_device_is_current(backend):
    """Triton 310, 2441, Liger 1303: a launch on the current device for tensors of another."""
    with torch.cuda.device(0):
        race(Target(backend, "cuda:1"), [(65,), (3, 4)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_norm_over_several_devices(backend):
    """38605: clipping took the norm of one device, or raised."""
    params = [*parameters([(65,)]), *parameters([(3, 4)], seed=1, device="cuda")]
    peers = twins(params)
    optimizer = Target(backend, "cuda").adamw(params, max_grad_norm=0.5)
    peer = torch.optim.AdamW(peers, foreach=False)
    for step in range(3):
        for mine in (params, peers):
            give_grads(mine, step)
        norm = torch.nn.utils.clip_grad_norm_(peers, 0.5)
        peer.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm.cpu(), norm.cpu(), rtol=1e-6, atol=0)
    assert_same_path(params, peers, 3, grad_error=1e-6)
