"""What stores and loads under test, all with the functions of `oracle`: numpy in, numpy out."""

import ctypes
from pathlib import Path

import compiler
import numpy as np
import torch

from fused_adamw.formats import BLOCK, FORMATS, noise_hash, noise_word

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

    def __init__(self, isa=()):
        source = Path(__file__).with_name("library.cpp")
        library = compiler.library(source, "-O3", "-fno-math-errno", "-Werror", *isa)
        self.library = ctypes.CDLL(str(library))
        self.library.block.restype = ctypes.c_int64
        self.block = self.library.block()

    def store(self, name, x, noise=None):
        return self._store(f"store_{name}", FORMATS[name], x, noise)

    def _store(self, function, format, x, noise, *block):
        x = np.ascontiguousarray(x, np.float32)
        noise = None if noise is None else np.ascontiguousarray(noise, np.int32)
        dtype = stored_dtype(format.dtype)
        memory = np.full(x.size + 64, 0x5A, dtype)
        values, side = memory[: x.size].reshape(x.shape), None
        if format.side_dtype is not None:
            side = np.empty(format.side_shape(x.shape), stored_dtype(format.side_dtype))
        sizes = map(ctypes.c_int64, (*x.shape, *block))
        self.library[function](*map(address, (x, noise)), *sizes, *map(address, (values, side)))
        assert (memory[x.size :] == 0x5A).all(), "written after the last element"
        return values, side

    def load(self, name, values, side):
        return self._load(f"load_{name}", FORMATS[name], values, side)

    def _load(self, function, format, values, side, *block):
        shape = values.shape
        values = np.atleast_2d(np.ascontiguousarray(values, stored_dtype(format.dtype)))
        if side is not None:
            side = np.ascontiguousarray(side, stored_dtype(format.side_dtype))
        x = np.empty(values.shape, np.float32)
        sizes = map(ctypes.c_int64, (*values.shape, *block))
        self.library[function](*map(address, (values, side)), *sizes, address(x))
        return x.reshape(shape)

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


class Blocks(Cpp):
    """csrc/cpu/blocks.h: blocks as the walk on the CPU loads and stores them.

    It never stores to nearest what takes noise: `csrc/formats.h` does so here.
    """

    def store(self, name, x, noise=None, block=None):
        format = FORMATS[name]
        if format.stochastic and noise is None:
            return super().store(name, x)
        return self._store(f"store_blocks_{name}", format, x, noise, block or self.size(name))

    def load(self, name, values, side, block=None):
        return self._load(f"load_blocks_{name}", FORMATS[name], values, side, block or self.size(name))

    def size(self, name):
        """Elements that the walk loads and stores at once."""
        return BLOCK if name.startswith("root") else self.block


def stored_dtype(dtype):
    """How numpy sees a dtype of torch."""
    return VIEW[dtype][1] if dtype in VIEW else torch.empty(0, dtype=dtype).numpy().dtype


def address(a):
    return None if a is None else ctypes.c_void_p(a.ctypes.data)
