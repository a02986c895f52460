"""Memory for kernels, with guards around it."""

import numpy as np
import torch
from format_codes import BF16, F16, F32, F64

TORCH = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16, F64: torch.float64}
SIZE = {F32: 4, BF16: 2, F16: 2, F64: 8}


def decode(stored: np.ndarray, dtype: int) -> np.ndarray:
    """Bytes as the arithmetic sees them."""
    values = torch.empty(len(stored) // SIZE[dtype], dtype=TORCH[dtype])
    if len(stored):
        values.view(torch.uint8).numpy()[:] = stored
    return values.to(torch.float64 if dtype == F64 else torch.float32).numpy()


class Buffer:
    """Values of a dtype, `shift` elements past a 16-byte border, and guards around them."""

    GUARD = 64

    def __init__(self, values, dtype: int, shift: int = 0) -> None:
        self.dtype, self.n = dtype, len(values)
        self.raw = np.full(self.n * SIZE[dtype] + 3 * self.GUARD, 0xA5, np.uint8)
        self.start = -self.raw.ctypes.data % 16 + self.GUARD + shift * SIZE[dtype]
        self.end = self.start + self.n * SIZE[dtype]
        self.write(values)
        self.address = self.raw.ctypes.data + self.start

    def encode(self, values) -> np.ndarray:
        stored = torch.as_tensor(np.asarray(values)).to(TORCH[self.dtype])
        return stored.view(torch.uint8).numpy() if self.n else np.zeros(0, np.uint8)

    def write(self, values) -> None:
        self.raw[self.start : self.end] = self.encode(values)

    @property
    def bytes(self) -> np.ndarray:
        return self.raw[self.start : self.end]

    @property
    def values(self) -> np.ndarray:
        """What is stored, as the arithmetic sees it."""
        return decode(self.bytes, self.dtype)

    @property
    def tensor(self) -> torch.Tensor:
        """The same memory."""
        if self.n == 0:
            return torch.empty(0, dtype=TORCH[self.dtype])
        return torch.frombuffer(self.raw, dtype=TORCH[self.dtype], count=self.n, offset=self.start)

    def check(self, values, what: str, rtol: float = 0.0) -> None:
        """The stored bytes are those of `values`, any NaN for a NaN, and the guards are whole."""
        expected = self.encode(values)
        if not np.array_equal(self.bytes, expected):
            np.testing.assert_allclose(self.values, decode(expected, self.dtype), rtol, 0, err_msg=what)
        assert (self.raw[: self.start] == 0xA5).all(), f"{what}: written before the first element"
        assert (self.raw[self.end :] == 0xA5).all(), f"{what}: written after the last element"
