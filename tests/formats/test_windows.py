"""Windows: a part of a tensor, and where its elements lie in the whole."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_adamw.formats import Window, element_index, has_dense_rows, window_of

from .test_tensors import laid_out


def cut_out(whole, box):
    """The part of a tensor in a box of (start, size), dense in memory in the order of the whole."""
    part = whole
    for dim, (start, size) in enumerate(box):
        part = part.narrow(dim, start, size)
    order = sorted(range(whole.dim()), key=lambda dim: -whole.stride(dim))
    return laid_out(part, order)


@st.composite
def parts(draw):
    """The shape and order in memory of a tensor, and a box in it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    box = []
    for size in shape:
        start = draw(st.integers(0, size))
        box.append(draw(st.sampled_from([(0, size), (start, draw(st.integers(0, size - start)))])))
    return shape, order, box


@settings(max_examples=300, deadline=None)
@given(parts(), st.booleans())
@example(([4, 6], [0, 1], [(2, 2), (0, 6)]), False)  # rows
@example(([4, 6], [0, 1], [(2, 2), (3, 3)]), True)  # rows and columns
@example(([4, 3, 2], [0, 1, 2], [(2, 1), (1, 2), (0, 1)]), False)  # one row, so columns may be cut twice
@example(([4, 6], [1, 0], [(0, 4), (3, 1)]), False)  # transposed, one column
def test_elements_of_a_part_have_the_places_of_the_whole(part, by_rows):
    shape, order, box = part
    whole = laid_out(torch.zeros(shape), order)
    t, expected = cut_out(whole, box), cut_out(element_index(whole), box)
    window = window_of(t, whole, [start for start, _ in box], by_rows=by_rows)
    if window is not None:
        assert element_index(t, window).equal(expected)
        if by_rows and t.numel():
            assert window.columns == t[0].numel()
            assert window.whole_columns == whole[0].numel()
        return
    # As a series of equal pieces at equal distances, they would have two strides at most.
    cut = sum(size != of for (_, size), of in zip(box, shape, strict=True))
    assert cut > 1 or (by_rows and (cut == 1 or not has_dense_rows(whole)))


def test_whole_tensors_and_shards_of_rows():
    whole = torch.empty(6, 4, 5)
    assert window_of(whole, whole, [0, 0, 0]) == Window(0, 1, 1)
    assert window_of(whole, whole, [0, 0, 0], by_rows=True) == Window(0, 20, 20)
    assert window_of(whole[2:5], whole, [2, 0, 0], by_rows=True) == Window(40, 20, 20)
    assert window_of(whole[2:5], whole, [2, 0, 0]) == Window(40, 1, 1)
    assert window_of(torch.empty(6, 2, 5), whole, [0, 2, 0]) == Window(10, 10, 20)
    assert window_of(torch.empty(3, 2, 5), whole, [3, 2, 0]) == Window(70, 10, 20)
    assert window_of(torch.empty(6, 2, 2), whole, [0, 2, 0]) is None  # cut twice
    assert window_of(torch.empty(6, 4, 2), whole, [0, 0, 0], by_rows=True) is None  # within a row


def test_a_part_in_another_order_has_no_window():
    whole = torch.empty(6, 4)
    assert window_of(torch.empty(4, 3).t(), whole, [0, 0]) is None
    assert window_of(torch.empty(4, 1).t(), whole, [5, 0]) == Window(20, 1, 1)  # one row has no order
