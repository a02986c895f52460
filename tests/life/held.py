"""What an optimizer holds: copies of it, comparisons, and in which precision a parameter is stepped."""

from typing import NamedTuple

import numpy as np
import oracle
import torch
from common import array
from formats import oracle as codec

AVERAGE, RESIDUAL, MAXIMUM = "ema", "master_residual", "max_exp_avg_sq"


def replica(t):
    """A copy with the same strides, offset and gaps, in memory of its own."""
    t = t.detach()
    copied = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone())
    copied = torch.as_strided(copied, t.shape, t.stride(), t.storage_offset())
    return torch._neg_view(copied) if t.is_neg() else copied


class Held(NamedTuple):
    """Copies of a parameter and its state."""

    p: torch.Tensor
    state: dict[str, torch.Tensor]


def held_by(optimizer):
    """Copies of all that an optimizer holds, in the order of its groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        Held(replica(p), {key: replica(t) for key, t in optimizer.state.get(p, {}).items()}) for p in params
    ]


def assert_equal(found, expected, what):
    """The same bits; in float64, clipped by a norm that may differ in its last ones, nearly."""
    is_wide = found.dtype == torch.float64
    torch.testing.assert_close(
        found,
        expected,
        rtol=1e-12 if is_wide else 0,
        atol=1e-14 if is_wide else 0,
        equal_nan=True,
        check_stride=False,
        msg=lambda message: f"{what}: {message}",
    )


def assert_held(found, expected):
    """Everything is as expected."""
    assert len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_equal(ours.p, theirs.p, f"parameter {i}")
        assert ours.state.keys() == theirs.state.keys(), i
        for key, value in ours.state.items():
            assert_equal(value, theirs.state[key], f"{key} of parameter {i}")


def weight_of(held):
    """A parameter in the precision in which it is stepped."""
    if RESIDUAL not in held.state:
        return array(held.p)
    upper = held.p.contiguous().view(torch.int16).numpy().astype(np.uint16)
    return codec.split_load(upper, held.state[RESIDUAL].numpy())


def stored_as(held):
    """The name of the format in which a parameter is kept."""
    return "float32" if RESIDUAL in held.state else name_of(held.p.dtype)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def assert_stored(found, expected, kept, what, slack=0, biggest=None):
    """Compare numbers with those that are expected once they are stored.

    Args:
        found: In numpy.
        expected: Not yet rounded.
        kept: The name of the dtype in which they are stored.
        what: They are.
        slack: Spacings of the numbers at the largest by which they may be off.
        biggest: The largest; None: of those expected.
    """
    expected = oracle.round_to(expected, kept)
    biggest = np.abs(expected).max(initial=0.0) if biggest is None else biggest
    atol = slack * torch.finfo(getattr(torch, kept)).eps * biggest if np.isfinite(biggest) else 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=what)
