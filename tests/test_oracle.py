"""Every backend against the numpy oracle."""

import numpy as np
import oracle
import pytest
import torch
from common import NATIVE, array, give_grads, parameters, ulp
from format_codes import CUDA_LAYOUTS, MIXES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_adamw.backends import native

CPU_CHUNK = native.chunk_size(torch.device("cpu"), 0)
# Relative spacing of stored numbers.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def name(dtype):
    """A dtype as the oracle names it."""
    return dtype and str(dtype).removeprefix("torch.")


def compare(target, optimizer, expected, steps, exact=True):
    """Parameters, moments and counts of `optimizer` against the oracle's after `steps` updates of each."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, slot, hypers in zip(params, expected.slots, expected.hypers, strict=True):
        state = optimizer.state.get(p)
        if not state:
            assert not slot.m.any()
            continue
        assert state["step"].item() == slot.step
        for key, value in (("exp_avg", slot.m), ("exp_avg_sq", slot.v), ("max_exp_avg_sq", slot.v_max)):
            if key in state:
                check(state[key], value, slot.state_dtype, exact and target.bitwise_states, steps, key)
        # The reference uses torch's sqrt, which on the CPU is 1 ulp off for some 0.6 % of all numbers: a
        # parameter may be rounded the other way at any step. Contraction does the same on a GPU.
        slack = 0.0
        if not target.bitwise_states:
            # Triton's interpreter truncates to bfloat16 where GPUs round: moments are off by a unit, and the
            # next updates, each of about lr, with them.
            slack = steps * 2 * hypers.lr * EPS[slot.state_dtype]
        check(p, slot.p, slot.param_dtype, exact and target.bitwise, steps, "parameter", slack)


def check(actual, expected, storage, bitwise, steps, what, slack=0.0):
    assert name(actual.dtype) == storage, what
    if bitwise:
        np.testing.assert_array_equal(array(actual), expected, err_msg=what)
    else:
        biggest = np.abs(expected).max(initial=0.0)
        atol = steps * EPS[storage] * biggest + slack
        np.testing.assert_allclose(array(actual), expected, rtol=0, atol=atol, err_msg=what)


def run(target, optimizer, expected, steps, first=0, grad_dtype=None, scale=1.0):
    """Take the same steps on both sides."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        give_grads(params, step, dtype=grad_dtype, scale=scale)
        optimizer.step()
        expected.step([array(p.grad) for p in params], measured_norm=norm_of(optimizer))


def norm_of(optimizer):
    """The norm that the kernels clipped by, in float64; None without a clip."""
    return None if optimizer.max_grad_norm is None else optimizer._status[0].item()


def pair(target, shapes, hypers=oracle.Hypers(), dtype=torch.float32, state_dtype=None, **options):  # noqa: B008
    """Our optimizer and the oracle's on the same parameters, as one group."""
    params = parameters(shapes, dtype=dtype, device=target.device)
    optimizer = target.adamw(params, state_dtype=state_dtype, **vars(hypers), **options)
    return optimizer, oracle.AdamW(
        [([array(p) for p in params], hypers)],
        name(dtype),
        name(state_dtype),
        max_grad_norm=options.get("max_grad_norm"),
    )


@pytest.mark.parametrize(
    "hypers",
    [
        oracle.Hypers(),
        oracle.Hypers(lr=1e-2, weight_decay=0.3),
        oracle.Hypers(weight_decay=0.0),
        oracle.Hypers(amsgrad=True),
        oracle.Hypers(maximize=True),
        oracle.Hypers(amsgrad=True, maximize=True, weight_decay=0.2),
        oracle.Hypers(betas=(0.0, 0.999)),
        oracle.Hypers(betas=(0.9, 0.0)),
        oracle.Hypers(betas=(0.0, 0.0)),
        oracle.Hypers(betas=(0.3, 0.4)),
        oracle.Hypers(betas=(0.5, 0.99)),
        oracle.Hypers(eps=0.0),
        oracle.Hypers(eps=1e-3, lr=0.1),
        oracle.Hypers(weight_decay_mode="schedule", weight_decay=0.1, lr=3e-4),
        oracle.Hypers(weight_decay_mode="corrected", weight_decay=0.1, lr=3e-4),
        oracle.Hypers(weight_decay_mode="constant", weight_decay=1e-3),
        oracle.Hypers(cautious_weight_decay=True, weight_decay=0.3, lr=1e-2),
        oracle.Hypers(cautious_weight_decay=True, maximize=True, weight_decay_mode="constant"),
        oracle.Hypers(nesterov=True),
        oracle.Hypers(nesterov=True, betas=(0.3, 0.9), amsgrad=True, cautious_weight_decay=True),
    ],
    ids=lambda h: (
        ",".join(f"{k}={v}" for k, v in vars(h).items() if v != getattr(oracle.Hypers(), k)) or "defaults"
    ),
)
def test_options(target, hypers):
    steps = 5 if target.slow else 50
    optimizer, expected = pair(target, [(65,), (3, 7)], hypers)
    run(target, optimizer, expected, steps)
    compare(target, optimizer, expected, steps)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # by their codes


@pytest.mark.parametrize("codes", MIXES, ids=lambda codes: "-".join(name(DTYPES[code]) for code in codes))
@pytest.mark.parametrize("amsgrad", [False, True])
def test_dtypes(target, codes, amsgrad):
    if codes not in CUDA_LAYOUTS and target.slow:
        pytest.skip("one kernel for all, seen at work with the others")
    param, grad, moments, _ = (DTYPES[code] for code in codes)
    steps = 2 if target.slow else 10
    params = parameters([(131,), (5, 3)], dtype=param, device=target.device)
    for p in params:
        p.grad_dtype = grad
    optimizer = target.adamw(params, lr=1e-2, amsgrad=amsgrad)
    expected = oracle.AdamW(
        [([array(p) for p in params], oracle.Hypers(lr=1e-2, amsgrad=amsgrad))], name(param), name(moments)
    )
    if moments is not param:  # any dtype, whether state_dtype can ask for it or not
        keys = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []))
        for p in params:
            zeros = {key: torch.zeros_like(p, dtype=moments) for key in keys}
            optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
    run(target, optimizer, expected, steps, grad_dtype=grad)
    compare(target, optimizer, expected, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_state_dtype(target, dtype, state_dtype):
    options = {"dtype": dtype, "state_dtype": state_dtype, "stochastic_rounding": False}
    optimizer, expected = pair(target, [(70,)], **options)
    run(target, optimizer, expected, 2)
    compare(target, optimizer, expected, 2)


@pytest.mark.parametrize("numel", [0, 1, 2, 63, 64, 65, 127, 128, 129, 3 * 64 + 7])
def test_sizes_around_blocks_and_chunks(target, numel, small_chunks):
    optimizer, expected = pair(target, [(3,), (numel,), (5,)], max_grad_norm=1.0)
    run(target, optimizer, expected, 2)
    compare(target, optimizer, expected, 2)
    np.testing.assert_allclose(optimizer.grad_norm.item(), expected.grad_norm, rtol=EPS["float32"])


@pytest.mark.parametrize("numel", [CPU_CHUNK - 1, CPU_CHUNK, CPU_CHUNK + 1, 3 * CPU_CHUNK + 7])
def test_sizes_around_real_chunks(target, numel):
    optimizer, expected = pair(target, [(numel,), (2,)])
    run(target, optimizer, expected, 1 if target.slow else 2)
    compare(target, optimizer, expected, 2)


def test_many_tensors(target):
    """As many as no table of pointers in kernel arguments holds, empty ones between them."""
    shapes = [(i % 7, 1 + i % 3) for i in range(20 if target.slow else 1000)]
    optimizer, expected = pair(target, shapes, max_grad_norm=1.0)
    run(target, optimizer, expected, 2)
    compare(target, optimizer, expected, 2)


def test_empty_tensors_leave_neighbours_alone(target):
    """Empty tensors at the places where tables of others had their borders."""
    empty = {0, 23, 29, 35, 47, 63, 109, 149}
    shapes = [(0,) if i in empty else (2,) for i in range(40 if target.slow else 150)]
    optimizer, expected = pair(target, shapes)
    run(target, optimizer, expected, 2)
    compare(target, optimizer, expected, 2)


def test_only_empty_tensors(target):
    optimizer, expected = pair(target, [(0,)] * 50, max_grad_norm=1.0)
    run(target, optimizer, expected, 2)
    compare(target, optimizer, expected, 2)
    assert optimizer.grad_norm.item() == 0.0


def test_groups_have_their_own_options(target):
    hypers = [
        oracle.Hypers(),
        oracle.Hypers(lr=3e-2, weight_decay=0.0),
        oracle.Hypers(betas=(0.2, 0.5), eps=1e-4, amsgrad=True),
        oracle.Hypers(maximize=True, weight_decay=0.5),
    ]
    lists = [parameters([(33,), (2, 2)], seed=i, device=target.device) for i in range(len(hypers))]
    expected = oracle.AdamW(
        [([array(p) for p in params], h) for params, h in zip(lists, hypers, strict=True)], max_grad_norm=0.7
    )
    optimizer = target.adamw(
        [{"params": params, **vars(h)} for params, h in zip(lists, hypers, strict=True)], max_grad_norm=0.7
    )
    steps = 3 if target.slow else 20
    run(target, optimizer, expected, steps)
    compare(target, optimizer, expected, steps)


def test_more_groups_than_fit_kernel_parameters(target):
    count = 70
    lists = [parameters([(2,)], seed=i, device=target.device) for i in range(count)]
    hypers = [oracle.Hypers(lr=1e-3 * (i + 1), weight_decay=0.01 * i) for i in range(count)]
    optimizer = target.adamw([{"params": p, **vars(h)} for p, h in zip(lists, hypers, strict=True)])
    expected = oracle.AdamW([([array(x) for x in p], h) for p, h in zip(lists, hypers, strict=True)])
    run(target, optimizer, expected, 1)
    compare(target, optimizer, expected, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e6, float("inf")])
def test_clipping(target, dtype, norm):
    steps = 2 if target.slow else 10
    optimizer, expected = pair(target, [(65,), (0,), (3, 4)], dtype=dtype, max_grad_norm=norm)
    run(target, optimizer, expected, steps)
    # The order of summation moves a norm in its last bits of float64; in float32 that rounds away.
    compare(target, optimizer, expected, 4 * steps, exact=dtype is torch.float32)
    np.testing.assert_allclose(optimizer.grad_norm.item(), expected.grad_norm, rtol=2 * EPS[name(dtype)])


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_loss_scale(target, max_grad_norm):
    optimizer, expected = pair(target, [(65,)], max_grad_norm=max_grad_norm)
    params = optimizer.param_groups[0]["params"]
    for step in range(3):
        give_grads(params, step, scale=1000.0)
        optimizer.grad_scale = torch.tensor(1000.0, device=target.device)
        optimizer.found_inf = torch.tensor(float(step == 1), device=target.device)
        optimizer.step()
        expected.step([array(p.grad) for p in params], loss_scale=1000.0, found_inf=step == 1)
    compare(target, optimizer, expected, 3)


def test_late_in_training(target):
    """Bias corrections far from 1 and at 1: the count is exact in float32 up to 2**24."""
    optimizer, expected = pair(target, [(65,)])
    run(target, optimizer, expected, 1)
    for count in (100, 5_000, 1_000_000):
        for p, slot in zip(optimizer.param_groups[0]["params"], expected.slots, strict=True):
            optimizer.state[p]["step"].fill_(count)
            slot.step = count
        run(target, optimizer, expected, 2, first=count)
        compare(target, optimizer, expected, 7)


def test_wide_range_of_gradients(target):
    """From subnormals to numbers whose squares are near overflow."""
    optimizer, expected = pair(target, [(160,)])
    (p,) = optimizer.param_groups[0]["params"]
    values = torch.logspace(-44, 19, 160).to(target.device)
    for sign in (1, -1, 1):
        p.grad = sign * values
        optimizer.step()
        expected.step([array(p.grad)])
    compare(target, optimizer, expected, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lr_zero_leaves_parameters_alone(target, dtype):
    optimizer, _ = pair(target, [(65,)], oracle.Hypers(lr=0.0, weight_decay=0.5), dtype=dtype)
    (p,) = optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    give_grads([p], 0)
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_threads_do_not_change_a_bit(dtype, threads):
    """Enough elements that several threads take part."""
    results = []
    for count in (1, 2):
        threads(count)
        optimizer, _ = pair(NATIVE, [(90_001,), (5,), (300, 300)], dtype=dtype, max_grad_norm=1.0)
        params = optimizer.param_groups[0]["params"]
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        results.append([*params, *(s["exp_avg_sq"] for s in optimizer.state.values()), optimizer.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_oracle_rounds_as_torch(storage):
    """The oracle's own rounding, for every float32 exponent and the middle between neighbours."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halfway = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    x = np.concatenate([bits, halfway]).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(
        oracle.round_to(x, storage), torch.from_numpy(x).to(getattr(torch, storage)).float().numpy()
    )


number = st.floats(0.0, 0.3)
beta = st.one_of(st.just(0.0), st.floats(0.0, 0.9999))
group = st.builds(
    oracle.Hypers,
    lr=number,
    betas=st.tuples(beta, beta),
    eps=st.sampled_from([1e-8, 1e-12, 1e-3]),
    weight_decay=number,
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)
shape = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.tuples(st.lists(shape, max_size=4), group), min_size=1, max_size=4),
    max_grad_norm=st.none() | st.floats(1e-3, 1e3),
    seed=st.integers(0, 999),
    present=st.lists(st.booleans(), min_size=16, max_size=16),
)
def test_any_groups(small_chunks, groups, max_grad_norm, seed, present):
    """Any shapes, options and missing gradients: the native backend is the oracle, bit for bit."""
    lists = [parameters(shapes, seed=seed + i) for i, (shapes, _) in enumerate(groups)]
    expected = oracle.AdamW(
        [([array(p) for p in params], h) for params, (_, h) in zip(lists, groups, strict=True)],
        max_grad_norm=max_grad_norm,
    )
    optimizer = NATIVE.adamw(
        [{"params": params, **vars(h)} for params, (_, h) in zip(lists, groups, strict=True)],
        max_grad_norm=max_grad_norm,
    )
    params = [p for params in lists for p in params]
    for step in range(3):
        give_grads(params, seed + step)
        for i, p in enumerate(params):
            if not present[(i + step) % 16]:
                p.grad = None
        optimizer.step()
        expected.step([None if p.grad is None else array(p.grad) for p in params])
    compare(NATIVE, optimizer, expected, 3)


def test_ulp_of_the_comparison_is_tight():
    """The comparison used above tells one unit in the last place, where it says bitwise."""
    x = torch.ones(4)
    y = array(x).copy()
    y[2] += ulp(y)
    with pytest.raises(AssertionError):
        check(x, y, "float32", bitwise=True, steps=1, what="x")
