"""Following a dimension through views, against tensors that vary along it alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_adamw.groups.use.dims import moved

SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=4)


def varies_along(tensor):
    """The one dimension along which values differ, None if there is no such."""
    found = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 and bool((tensor.diff(dim=d) != 0).any())]
    return found[0] if len(found) == 1 else None


def draw_view(data, shape):
    """A view: (operator, arguments after the operand)."""
    rank = len(shape)
    dims = st.integers(-rank, rank - 1)
    kind = data.draw(st.sampled_from(["permute", "transpose", "unsqueeze", "select", "view", "expand", "t"]))
    if kind == "permute":
        return kind, (data.draw(st.permutations(range(rank))),)
    if kind == "transpose":
        return kind, (data.draw(dims), data.draw(dims))
    if kind == "unsqueeze":
        return kind, (data.draw(st.integers(-rank - 1, rank)),)
    if kind == "select":
        return kind, (data.draw(dims), 0)
    if kind == "expand":
        return kind, ((3, *shape),)
    if kind == "view":
        cut = data.draw(st.integers(0, rank))
        merged = (*shape[:cut], torch.Size(shape[cut : cut + 2]).numel(), *shape[cut + 2 :])
        return kind, (merged if data.draw(st.booleans()) else (1, *shape),)
    return ("t", ()) if rank == 2 else ("clone", ())


@settings(max_examples=200, deadline=None)
@given(SIZES, st.data())
def test_views(shape, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    line = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
    tensor = line.expand(shape).contiguous()
    name, args = draw_view(data, shape)
    result = getattr(torch.ops.aten, name)(tensor, *args)
    found = moved(name, (tensor, *args), dim, shape, result.shape)
    expected = varies_along(result)
    if expected is not None and result.shape[expected] != shape[dim]:
        expected = None  # merged with another one
    assert found == expected, (name, args)
