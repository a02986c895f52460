"""How tensors lie in memory: alike, densely, over each other."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fused_adamw import layout


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.empty(3, 4), torch.empty(3, 4), True),
        (torch.empty(3, 4), torch.empty(4, 3).t(), False),
        (torch.empty(3, 1), torch.empty(3, 7)[:, :1], False),
        (torch.empty(1, 4), torch.empty(5, 4)[:1], True),
        (torch.empty(1, 4).as_strided((1, 4), (99, 1)), torch.empty(1, 4), True),
        (torch.empty(4), torch.empty(2, 2), False),
        (torch.empty(()), torch.empty(()), True),
    ],
)
def test_same_layout(a, b, same):
    strides = a.stride(), b.stride()
    for one, other in (strides, strides[::-1]):
        assert (a.shape == b.shape and layout.same_layout(a.shape, one, other)) == same


@pytest.mark.parametrize(
    ("t", "dense"),
    [
        (torch.empty(3, 4, 5), True),
        (torch.empty(3, 4, 5).permute(2, 0, 1), True),
        (torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 4)[:, :3], False),
        (torch.empty(3, 4)[1:], True),
        (torch.empty(3, 4)[::2], False),
        (torch.empty(1).expand(3), False),
        (torch.empty(3, 1).expand(3, 4), False),
        (torch.empty(0, 4)[:, ::2], True),
        (torch.empty(()), True),
        (torch.empty(8).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_is_dense(t, dense):
    assert layout.is_dense(t.shape, t.stride()) == dense


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_overlapping(pieces):
    """Against the bytes of each."""
    spans = layout.Spans([size for _, size in pieces])
    found = spans.overlapping(torch.tensor([start for start, _ in pieces], dtype=torch.int64))
    covered = [set(range(start, start + size)) for start, size in pieces]
    shared = {i for i, a in enumerate(covered) for j, b in enumerate(covered) if i != j and a & b}
    assert found <= shared
    assert bool(found) == bool(shared)
    # All but pieces that lie in a longer one are named beside it.
    assert all(any(a & covered[j] for j in found) for i, a in enumerate(covered) if i in shared)
