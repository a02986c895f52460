"""Whatever the strides, offsets and alignment of parameter, gradient and moments, a step is the same step.

torch's own fused CPU kernel computes wrong values, outside of views too, unless all share one dense layout.
"""

import itertools
import math
import weakref

import numpy as np
import oracle
import pytest
import torch
from common import array, assert_same_path, parameters, randn, twins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

SHAPE = (4, 3, 2, 6)
GUARD = 777.0


def contiguous(x):
    return x.clone()


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x):
    """Every second column of something wider."""
    out = torch.full((*x.shape[:-1], 2 * x.shape[-1]), GUARD, dtype=x.dtype, device=x.device)[..., ::2]
    return out.copy_(x)


def rows_of_wider(x):
    """Rows with gaps between them."""
    out = torch.full((*x.shape[:-1], x.shape[-1] + 3), GUARD, dtype=x.dtype, device=x.device)[..., 1:-2]
    return out.copy_(x)


def flipped(x):
    """Values of a flip: torch has no negative strides, it copies."""
    return x.flip(0).contiguous().flip(0)


def at_offset(x, offset=1):
    """Inside a longer buffer, as a gradient in a DDP bucket: not aligned to a vector."""
    buffer = torch.full((x.numel() + 16,), GUARD, dtype=x.dtype, device=x.device)
    return buffer[offset : offset + x.numel()].view(x.shape).copy_(x)


LAYOUTS = [contiguous, transposed, channels_last, sliced, rows_of_wider, at_offset]


def whole_buffer(t):
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def guards(t):
    """The elements of a view's buffer that are not the view's."""
    buffer = whole_buffer(t.detach())
    mask = torch.ones_like(buffer, dtype=torch.bool)
    mask.as_strided(t.size(), t.stride(), t.storage_offset()).fill_(False)
    return buffer[mask]


def check(target, layouts, shape=SHAPE, steps=2, dtype=torch.float32, moments=None, **options):
    """Step a parameter whose tensors are laid out by `layouts`: param, grad, exp_avg, exp_avg_sq."""
    lay_p, lay_g, lay_m, lay_v = layouts
    start = randn(*shape, dtype=dtype, device=target.device)
    p = torch.nn.Parameter(lay_p(start))
    optimizer = target.adamw([p], lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, **options)
    zeros = torch.zeros_like(start, memory_format=torch.contiguous_format)
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": lay_m(zeros), "exp_avg_sq": lay_v(zeros)}
    tensors = [p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
    hypers = oracle.Hypers(lr=1e-2, weight_decay=0.1)
    expected = oracle.AdamW([([array(start).astype(np.float64)], hypers)], "float64", max_grad_norm=1.0)
    for step in range(steps):
        grad = randn(*shape, seed=step + 1, dtype=dtype, device=target.device)
        p.grad = lay_g(grad)
        optimizer.step()
        expected.step([array(p.grad)])
        assert (guards(p.grad) == GUARD).all()
    (slot,) = expected.slots
    state = optimizer.state[p]
    for actual, value in ((p, slot.p), (state["exp_avg"], slot.m), (state["exp_avg_sq"], slot.v)):
        # float32 against float64: the two roundings of every step, and those of the clipped gradient.
        np.testing.assert_allclose(
            array(actual), value, rtol=0, atol=steps * 4 * 2**-23 * max(1, abs(value).max())
        )
    for t in tensors:
        assert (guards(t) == GUARD).all()
    return optimizer


@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=lambda x: "-".join(f.__name__ for f in x)
)
def test_parameter_and_gradient(target, layouts):
    check(target, (*layouts, contiguous, contiguous))


@pytest.mark.parametrize("param", LAYOUTS, ids=lambda f: f.__name__)
def test_moments_like_the_parameter(target, param):
    check(target, (param,) * 4)


@pytest.mark.parametrize("lay_m", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("param", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_moments_with_other_strides(target, param, lay_m):
    check(target, (param, param, lay_m, contiguous))
    check(target, (param, param, param, lay_m))


def test_expanded_gradient(target):
    """As autograd hands out for a sum: one element with strides of 0."""
    for shape in ((5,), (3, 4)):
        p = torch.nn.Parameter(randn(*shape, device=target.device))
        copy = torch.nn.Parameter(p.detach().clone())
        optimizer = target.adamw([p], max_grad_norm=1.0)
        other = target.adamw([copy], max_grad_norm=1.0)
        for step in (1, 2):
            p.grad = torch.full((), float(step), device=target.device).expand(shape)
            copy.grad = p.grad.contiguous()
            optimizer.step()
            other.step()
        torch.testing.assert_close(p, copy, rtol=0, atol=2 * 2 * 2**-23 * 4)


@st.composite
def layouts_of(draw, shape):
    """A function that gives values another layout: dimensions in another order, with gaps, or of stride 0."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    expanded = [draw(st.sampled_from([False, False, True])) for _ in shape]

    def lay(x):
        wide = [1 if shape[d] and expanded[d] else shape[d] * steps[d] for d in order]
        memory = torch.full(wide, GUARD, dtype=x.dtype, device=x.device)
        t = memory.permute([order.index(d) for d in range(len(shape))])
        for d, step in enumerate(steps):
            if not expanded[d]:
                t = t[(slice(None),) * d + (slice(None, None, step),)]
        t.copy_(x[tuple(slice(t.shape[d]) for d in range(len(shape)))])
        return t.expand(shape)

    return lay


@st.composite
def steps_of_layouts(draw):
    """A shape, the order of a parameter's dimensions, and the layout of its gradient in three steps."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    order = draw(st.permutations(range(len(shape))))
    return shape, order, [draw(layouts_of(shape)) for _ in range(3)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=steps_of_layouts(),
    dtypes=st.sampled_from([(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2])
    | st.just((torch.bfloat16, torch.float32)),
    options=st.fixed_dictionaries(
        {"max_grad_norm": st.sampled_from([None, 0.5]), "amsgrad": st.booleans(), "stats": st.booleans()}
    ),
)
def test_any_layout_of_the_gradient(target, steps, dtypes, options):
    """Bit for bit as with one that is laid out as the parameter, which is left as it was."""
    if target.slow and not options["max_grad_norm"]:
        return
    shape, order, lays = steps
    start = randn(*(shape[d] for d in order), dtype=dtypes[0], device=target.device)
    params = [start.permute([order.index(d) for d in range(len(shape))])]
    params = [nn.Parameter(params[0].clone(memory_format=torch.preserve_format)) for _ in range(2)]
    options = {"lr": 0.1, "stochastic_rounding": False, **options}
    ours, plain = (target.adamw([("x", p)], **options) for p in params)
    for step, lay in enumerate(lays):
        grad = lay(randn(*shape, seed=step + 1, dtype=dtypes[1], device=target.device))
        memory = whole_buffer(grad).clone()
        dense = torch.empty_like(params[0], dtype=dtypes[1]).copy_(grad)
        for p, g in zip(params, (grad, dense), strict=True):
            p.grad_dtype = dtypes[1]
            p.grad = g
        ours.step()
        plain.step()
        assert params[0].grad is grad
        assert torch.equal(whole_buffer(grad), memory)
        if target.backend != "reference":  # whose sums depend on the order in memory
            for optimizer in (ours, plain):
                assert not optimizer._plan.fallbacks
            if options["max_grad_norm"] is not None or options["stats"]:
                assert ours.param_stats() == plain.param_stats()
    tolerance = {"rtol": 0, "atol": 0} if target.backend != "reference" else {"rtol": 1e-2, "atol": 1e-5}
    for a, b in zip(
        [params[0], *ours.state[params[0]].values()],
        [params[1], *plain.state[params[1]].values()],
        strict=True,
    ):
        torch.testing.assert_close(a, b, check_stride=True, **tolerance)


@pytest.mark.parametrize("lay", [transposed, channels_last, sliced, rows_of_wider], ids=lambda f: f.__name__)
def test_other_gradient_layouts_against_torch(target, lay):
    """Which is right where its gradients are laid out as its parameters; ours beside one that is."""
    params = parameters([SHAPE, SHAPE, (5,)], device=target.device)
    params[1] = torch.nn.Parameter(channels_last(params[1].detach()))
    peers = twins(params)
    ours = target.adamw(params, lr=1e-2, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(peers, lr=1e-2, foreach=False)
    for step in range(3):
        for i, (p, peer) in enumerate(zip(params, peers, strict=True)):
            grad = randn(*p.shape, seed=10 * step + i, device=target.device)
            peer.grad = torch.empty_like(peer).copy_(grad)
            p.grad = lay(grad) if p.dim() == 4 and (step, i) != (1, 0) else grad
        if step == 1:
            params[1].grad = peers[1].grad = None
        torch.nn.utils.clip_grad_norm_(peers, 0.5)
        ours.step()
        theirs.step()
    assert not ours._plan.fallbacks
    assert_same_path(params, peers, 3, grad_error=1e-6)


def test_a_gradient_of_another_layout_that_is_refilled(target):
    """It stays where it is, the memory of its last copy is given to others."""
    p = torch.nn.Parameter(randn(64, 32, device=target.device))
    q = torch.nn.Parameter(p.detach().clone())
    ours, plain = target.adamw([p], max_grad_norm=1.0), target.adamw([q], max_grad_norm=1.0)
    p.grad, q.grad = transposed(torch.zeros_like(p)), torch.zeros_like(q)
    others = []
    for step in range(4):
        for grad in (p.grad, q.grad):
            grad.copy_(randn(64, 32, seed=step, device=target.device))
        ours.step()
        others += [torch.full_like(q, math.nan) for _ in range(4)]
        plain.step()
    torch.testing.assert_close(p, q, rtol=0, atol=0 if target.backend != "reference" else 1e-6)


def test_copies_of_gradients_are_let_go(target):
    """They take memory for as long as a step takes."""
    p = torch.nn.Parameter(randn(64, 32, device=target.device))
    optimizer = target.adamw([p], max_grad_norm=1.0)
    p.grad = transposed(randn(64, 32, device=target.device))
    made = []

    class Made(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.empty_strided:
                made.append(weakref.ref(result))
            return result

    optimizer.step()
    with Made():
        optimizer.step()
    assert len(made) == (target.backend != "reference")
    assert not any(ref() is not None for ref in made)


def test_strides_of_single_element_dimensions(target):
    """Autograd gives them any number; they do not change where an element is."""

    def odd(x):
        return x.clone().as_strided(x.shape, (6, 99, 1, 1))

    shape = (4, 1, 6, 1)
    optimizer = check(target, (contiguous, odd, odd, contiguous), shape=shape)
    assert not optimizer._plan.fallbacks
    check(target, (odd, contiguous, odd, odd), shape=shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", range(1, 8))
def test_misaligned_storage(target, offset, dtype):
    """Every tensor at another offset: the result is that of aligned ones, bit for bit."""
    numel = 141
    results = []
    for lay in (lambda x, _: x.clone(), at_offset):
        p = torch.nn.Parameter(lay(randn(numel, dtype=dtype, device=target.device), offset))
        optimizer = target.adamw([p], max_grad_norm=1.0)
        zeros = torch.zeros_like(p.detach())
        moments = {"exp_avg": lay(zeros, (offset + 3) % 8), "exp_avg_sq": lay(zeros, 8 - offset)}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        for step in range(2):
            p.grad = lay(randn(numel, seed=step, dtype=dtype, device=target.device), (offset + 1) % 8)
            optimizer.step()
        assert not optimizer._plan.fallbacks
        results.append([p, *moments.values()])
    for aligned, moved in zip(*results, strict=True):
        assert torch.equal(aligned, moved)
        assert (guards(moved) == GUARD).all()


def test_gradients_in_one_bucket(target):
    """As under DDP: views of one flat buffer, which is refilled in place."""
    shapes = [(3,), (5, 2), (), (7,), (1, 1)]
    params = [torch.nn.Parameter(randn(*s, seed=i, device=target.device)) for i, s in enumerate(shapes)]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    bucket = torch.zeros(sum(p.numel() for p in params), device=target.device)
    offset = 0
    for p in params:
        p.grad = bucket[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    ours, plain = target.adamw(params, max_grad_norm=1.0), target.adamw(copies, max_grad_norm=1.0)
    for step in range(3):
        bucket.copy_(randn(bucket.numel(), seed=step))
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_parameters_in_one_flat_buffer(target):
    """Views of one storage as parameters: each element is stepped once, the gaps never."""
    flat = torch.full((64,), GUARD, device=target.device)
    places = [(1, (3,)), (6, (2, 5)), (20, ()), (30, (4, 4))]
    params, expected = [], flat.clone()
    for start, shape in places:
        numel = torch.Size(shape).numel()
        params.append(torch.nn.Parameter(flat[start : start + numel].view(shape)))
        expected[start : start + numel] = GUARD - 1.0
        params[-1].grad = torch.ones_like(params[-1])
    target.adamw(params, lr=1.0, weight_decay=0.0).step()
    torch.testing.assert_close(flat, expected, rtol=0, atol=1e-4)
    untouched = expected == GUARD
    assert (flat[untouched] == GUARD).all()


def test_scalar_parameter(target):
    check(target, (contiguous,) * 4, shape=())


def test_flips(target):
    check(target, (flipped, flipped, contiguous, flipped))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_restrided_by_a_checkpoint(target, amsgrad):
    """A channels-last model that loads a file with contiguous moments, and the other way round."""
    for live, saved in itertools.permutations((contiguous, channels_last)):
        p = torch.nn.Parameter(live(randn(*SHAPE, device=target.device)))
        q = torch.nn.Parameter(saved(randn(*SHAPE, device=target.device)))
        optimizer, other = (target.adamw([t], amsgrad=amsgrad) for t in (p, q))
        for t in (p, q):
            t.grad = torch.empty_like(t).copy_(randn(*SHAPE, seed=1))
        other.step()
        optimizer.load_state_dict(other.state_dict())
        p.data.copy_(q.data)
        for o in (optimizer, other):
            o.step()
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()
        assert not optimizer._plan.fallbacks
        torch.testing.assert_close(p, q, rtol=0, atol=2 * 2**-23 * 4)


def test_layout_of_the_gradient_changes_between_steps(target):
    p = torch.nn.Parameter(randn(4, 5, device=target.device))
    q = torch.nn.Parameter(p.detach().clone())
    optimizer, plain = target.adamw([p]), target.adamw([q])
    for step, lay in enumerate((contiguous, transposed, sliced, contiguous, at_offset)):
        grad = randn(4, 5, seed=step, device=target.device)
        p.grad, q.grad = lay(grad), grad
        optimizer.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=0, atol=5 * 2 * 2**-23 * 4)
