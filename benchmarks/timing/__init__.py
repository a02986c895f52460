"""Time steps of optimizers, and the memory that bounds them."""

from .bandwidth import Bandwidth, bandwidth
from .interleaved import BLOCKS, InterleavedTimer, Turn, block_medians, threads, time_steps

__all__ = [
    "BLOCKS",
    "Bandwidth",
    "InterleavedTimer",
    "Turn",
    "bandwidth",
    "block_medians",
    "threads",
    "time_steps",
]
