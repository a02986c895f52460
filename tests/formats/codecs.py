"""What stores and loads under test, all with the functions of `oracle`: numpy in, numpy out."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

from fused_adamw.formats import FORMATS, noise_hash, noise_word

# How numpy sees what a format keeps.
VIEW = dict.fromkeys((torch.bfloat16, torch.float16), (torch.int16, np.uint16))


def to_numpy(t):
    """A tensor's values, those of 16-bit floats as uint16."""
    seen, dtype = VIEW.get(t.dtype, (t.dtype, None))
    out = t.contiguous().view(seen).cpu().numpy()
    return out if dtype is None else out.view(dtype)


def to_torch(a, dtype, device):
    """The inverse of `to_numpy`."""
    seen, _ = VIEW.get(dtype, (dtype, None))
    return (
        torch.tensor(np.asarray(a).astype(np.int64) if seen != dtype else a).to(seen).view(dtype).to(device)
    )


class Torch:
    """fused_adamw/formats.py."""

    def __init__(self, device):
        self.device = device

    def store(self, name, x, noise=None):
        x = torch.tensor(x, device=self.device)
        if noise is not None:
            noise = torch.tensor(np.asarray(noise, np.int32), device=self.device)
        values, side = FORMATS[name].store(x, noise, x)
        return to_numpy(values), None if side is None else to_numpy(side)

    def load(self, name, values, side):
        format = FORMATS[name]
        values = to_torch(values, format.dtype, self.device)
        side = None if side is None else to_torch(side, format.side_dtype, self.device)
        return format.load(values, side).cpu().numpy()

    def noise_hash(self, seed, ordinal, step, index):
        index = torch.tensor(np.asarray(index).astype(np.int64), device=self.device)
        step = torch.tensor(step, dtype=torch.float64, device=self.device)
        return noise_hash(noise_word(seed, ordinal), step, index).cpu().numpy().astype(np.uint32)


class Cpp:
    """csrc/formats.h, csrc/noise.h and csrc/cpu/blocks.h, compiled by g++ as the kernels are.

    Attributes:
        block: Elements that the walk on the CPU loads and stores at once.
    """

    def __init__(self, compiler, folder, isa=()):
        library = folder / "formats.so"
        flags = [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-shared",
            "-fno-math-errno",
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
            *isa,
        ]
        source = Path(__file__).with_name("library.cpp")
        subprocess.run([compiler, *flags, "-o", library, source], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.block.restype = ctypes.c_int64
        self.block = self.library.block()

    def store(self, name, x, noise=None):
        x = np.ascontiguousarray(x, np.float32)
        noise = None if noise is None else np.ascontiguousarray(noise, np.int32)
        format = FORMATS[name]
        values = np.empty(x.shape, stored_dtype(format.dtype))
        side = None
        if format.side_dtype is not None:
            side = np.empty(format.side_shape(x.shape), stored_dtype(format.side_dtype))
        rows, columns = map(ctypes.c_int64, x.shape)
        self.library[f"store_{name}"](*map(address, (x, noise)), rows, columns, *map(address, (values, side)))
        return values, side

    def load(self, name, values, side):
        format = FORMATS[name]
        shape = values.shape
        values = np.atleast_2d(np.ascontiguousarray(values, stored_dtype(format.dtype)))
        if side is not None:
            side = np.ascontiguousarray(side, stored_dtype(format.side_dtype))
        x = np.empty(values.shape, np.float32)
        rows, columns = map(ctypes.c_int64, values.shape)
        self.library[f"load_{name}"](*map(address, (values, side)), rows, columns, address(x))
        return x.reshape(shape)

    def load_blocks(self, name, values, n):
        """Load a vector n values at a time."""
        x = np.zeros(len(values), np.float32)
        for i in range(0, len(values), n):
            part, to = values[i : i + n], x[i : i + n]
            self.library[f"load_block_{name}"](address(part), ctypes.c_int64(len(part)), address(to))
        return x

    def store_blocks(self, name, x, n):
        """Store a vector n values at a time, and nothing after them."""
        out = np.full(len(x) + 1, 0x1234, np.uint16)
        for i in range(0, len(x), n):
            part = x[i : i + n]
            self.library[f"store_block_{name}"](address(out[i:]), ctypes.c_int64(len(part)), address(part))
            assert out[i + len(part)] == 0x1234
        return out[:-1]

    def noise_hash(self, seed, ordinal, step, index):
        index = np.ascontiguousarray(index, np.uint64)
        out = np.empty(index.shape, np.uint32)
        word, step, n = (
            ctypes.c_int64(noise_word(seed, ordinal)),
            ctypes.c_uint64(step),
            ctypes.c_int64(index.size),
        )
        self.library.noise_hash(word, step, address(index), n, address(out))
        return out


def stored_dtype(dtype):
    """How numpy sees a dtype of torch."""
    return VIEW[dtype][1] if dtype in VIEW else torch.empty(0, dtype=dtype).numpy().dtype


def address(a):
    return None if a is None else ctypes.c_void_p(a.ctypes.data)
