"""The memory traffic of an AdamW update with next to no arithmetic, on a GPU: stream.cpp's loop."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _stream(p, g, m, v, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(g + i)
    tl.store(p + i, tl.load(p + i) + gradient)
    tl.store(m + i, tl.load(m + i) + gradient)
    tl.store(v + i, tl.load(v + i) + gradient)


def stream(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    """Read four tensors, write three; their sizes are multiples of 4096."""
    _stream[(p.numel() // _BLOCK,)](p, g, m, v, BLOCK=_BLOCK, num_warps=8)
