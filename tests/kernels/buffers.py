"""Memory for kernels, with guards around it: tensors as formats keep them."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch
from format_codes import BF16, F16, F32, F64, NAMES, PLAIN, SIGNED, SPLIT, STOCHASTIC, UNSIGNED
from formats import oracle as codec

U16 = np.uint16
Stored = tuple[np.ndarray, np.ndarray | None]  # values and side
VALUES = {F32: np.float32, F64: np.float64, SIGNED: np.int8, UNSIGNED: np.uint8}
VALUES |= dict.fromkeys((BF16, F16, STOCHASTIC, SPLIT), U16)
SIDES = {SPLIT: np.int16, SIGNED: np.float32, UNSIGNED: np.float32}


PROCESS = ctypes.CDLL(None)


def forbid(address: int, size: int) -> None:
    """Under AddressSanitizer, let no kernel read or write memory, either; else do nothing."""
    if hasattr(PROCESS, "__asan_poison_memory_region"):
        PROCESS.__asan_poison_memory_region(ctypes.c_void_p(address), ctypes.c_size_t(size))


def allow(address: int, size: int) -> None:
    """Undo `forbid`."""
    if hasattr(PROCESS, "__asan_unpoison_memory_region"):
        PROCESS.__asan_unpoison_memory_region(ctypes.c_void_p(address), ctypes.c_size_t(size))


class Memory:
    """Elements `shift` places past a 16-byte border, and guards around them."""

    GUARD = 64

    def __init__(self, elements: np.ndarray, shift: int = 0) -> None:
        self.raw = np.full(elements.nbytes + 3 * self.GUARD, 0xA5, np.uint8)
        self.start = -self.raw.ctypes.data % 16 + self.GUARD + shift * elements.itemsize
        self.end = self.start + elements.nbytes
        self.address = self.raw.ctypes.data + self.start
        self.elements = self.raw[self.start : self.end].view(elements.dtype)
        self.elements[:] = elements
        base = self.raw.ctypes.data
        forbid(base, self.start)
        forbid(base + self.end, self.raw.nbytes - self.end)
        weakref.finalize(self.raw, allow, base, self.raw.nbytes)  # numpy keeps small blocks to use again

    def check_guards(self, what: str) -> None:
        assert (self.raw[: self.start] == 0xA5).all(), f"{what}: written before the first element"
        assert (self.raw[self.end :] == 0xA5).all(), f"{what}: written after the last element"


class Buffer:
    """A tensor in a format.

    Args:
        numbers: What it holds at first, to nearest.
        format: One of `format_codes`.
        shift: Elements past a 16-byte border, of the values.
        side_shift: The same, of the side.
        columns: Of codes: the length of the rows that are cut into blocks; None: there is one row.
    """

    def __init__(
        self, numbers, format: int, shift: int = 0, side_shift: int = 0, columns: int | None = None
    ) -> None:
        self.format, self.n = format, len(numbers)
        self.columns = columns or max(1, self.n)
        values, side = self.stored(numbers)
        self.memory = Memory(values, shift)
        self.side = None if side is None else Memory(side, side_shift)

    @property
    def address(self) -> int:
        return self.memory.address

    @property
    def side_address(self) -> int:
        return 0 if self.side is None else self.side.address

    @property
    def parts(self) -> list[Memory]:
        return [self.memory] if self.side is None else [self.memory, self.side]

    @property
    def tensor(self) -> torch.Tensor:
        """The same memory, of a format that torch has."""
        dtype = {F32: torch.float32, F64: torch.float64}[self.format]
        if self.n == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.memory.raw, dtype=dtype, count=self.n, offset=self.memory.start)

    # ---- Numbers

    def stored(self, numbers, noise=None) -> Stored:
        """What the format makes of numbers, to nearest without noise: values and side."""
        wide = np.asarray(numbers, np.float64 if self.format == F64 else np.float32)
        if self.format in (F32, F64):
            return wide, None
        matrix = wide.reshape(-1, self.columns)
        noise = None if noise is None else noise.reshape(matrix.shape)
        values, side = codec.store(NAMES[self.format], matrix, noise)
        flat = values.reshape(-1).astype(VALUES[self.format])
        return flat, None if side is None else side.reshape(-1).astype(SIDES[self.format])

    def loaded(self, values: np.ndarray, side: np.ndarray | None) -> np.ndarray:
        """The numbers, as the arithmetic sees them."""
        if self.format in (F32, F64):
            return values
        if self.format in (SIGNED, UNSIGNED):
            values = values.reshape(-1, self.columns)
            side = side.reshape(len(values), -1) if len(values) else np.zeros((0, 0), np.float32)
        with np.errstate(all="ignore"):
            return codec.load(NAMES[self.format], values, side).reshape(-1)

    @property
    def values(self) -> np.ndarray:
        return self.loaded(*self.snapshot())

    def write(self, numbers) -> None:
        self.restore(self.stored(numbers))

    # ---- Bits

    def snapshot(self) -> Stored:
        """Copies of values and side."""
        return self.memory.elements.copy(), None if self.side is None else self.side.elements.copy()

    def restore(self, stored: Stored) -> None:
        for part, elements in zip(self.parts, stored, strict=False):
            part.elements[:] = elements

    def check(self, numbers, what: str, noise=None, rtol: float = 0.0) -> None:
        """The memory holds what the format makes of numbers."""
        self.check_stored(self.stored(numbers, noise), what, rtol)

    def check_stored(self, stored: Stored, what: str, rtol: float = 0.0) -> None:
        """The memory holds these bits, and the guards are whole.

        Where torch would hold a NaN, any NaN will do; in the other formats its sign is free.

        Args:
            stored: Values and side.
            what: For messages.
            rtol: How far numbers may be off instead.
        """
        mine = self.snapshot()
        if rtol:
            np.testing.assert_allclose(self.loaded(*mine), self.loaded(*stored), rtol, 0, err_msg=what)
        else:
            expected = self.without_nan(*stored)
            np.testing.assert_array_equal(self.without_nan(*mine), expected, err_msg=what)
            if self.side is not None:
                sides = (side.view(f"u{side.itemsize}") for side in (mine[1], stored[1]))
                np.testing.assert_array_equal(*sides, err_msg=f"side of {what}")
        for part in self.parts:
            part.check_guards(what)

    def without_nan(self, values: np.ndarray, side: np.ndarray | None) -> np.ndarray:
        """The bits of the values, with one NaN for all that count as the same."""
        bits = values.view(f"u{values.itemsize}")
        if self.format in (SIGNED, UNSIGNED):
            return bits
        nan = np.isnan(self.loaded(values, side))
        if self.format in PLAIN:
            return np.where(nan, bits.dtype.type(np.iinfo(bits.dtype).max), bits)
        return np.where(nan, bits & U16(0x7FFF), bits)
