"""The kernels under test: native on the CPU, CUDA emulated on the CPU, Triton interpreted."""

from __future__ import annotations

import ctypes
from pathlib import Path

import compiler
import numpy as np
import torch
from format_codes import BF16, CPU_LAYOUTS, CUDA_LAYOUTS, F64
from instruction_sets import ISAS

from fused_adamw.backends import native
from fused_adamw.tables import StepInputs, StepInputsStruct, Tables

ROOT = Path(__file__).parents[2]


class Kernels:
    """One implementation.

    Attributes:
        layouts: Formats of parameter, gradient and moments that it has.
        block: Elements that it steps at once, of float32.
        chunk: Elements of a chunk, over which the update makes more than one pass.
        norm_chunk: The same for the norm.
        grids: Ways to share out the chunks; the first is the usual one.
        is_slow: Whether fewer rows have to do.
        subnormal_bfloat16: Whether it rounds them at all.
        norm_rtol: Of the sum of a chunk, where it is not of float64.
    """

    layouts = CUDA_LAYOUTS
    grids: tuple[int, ...]
    is_slow = False
    subnormal_bfloat16 = True

    def rtol(self, formats) -> float:
        """How far results may be from a chain of numpy operations."""
        return 0.0

    def rounded(self, values: np.ndarray, dtype: int) -> np.ndarray:
        """Results before they are encoded, which rounds to nearest even."""
        return values


class Native(Kernels):
    """The C++ kernels, through the operators. A grid is a number of threads."""

    layouts = CPU_LAYOUTS
    block, chunk, norm_chunk = 32, 1000, 1000
    grids = (1, 2, 3)
    norm_rtol = 2e-7

    def sum_of_squares(self, t: Tables, out: torch.Tensor, threads: int) -> None:
        torch.set_num_threads(threads)
        native.sum_of_squares(t, t.chunks, out)

    def update(self, t: Tables, inputs: StepInputs, threads: int) -> None:
        torch.set_num_threads(threads)
        native.update(t, inputs)


class Triton(Kernels):
    """The Triton kernels in the interpreter. A grid is a number of programs."""

    block, chunk, norm_chunk = 512, 2 * 512 + 16, 2 * 1024 + 16  # aligned, no whole number of blocks
    grids = (3, 1, 2, 4, 5, 18)
    is_slow = True
    subnormal_bfloat16 = False  # the interpreter takes wrong bits
    norm_rtol = 1e-13

    def __init__(self, monkeypatch) -> None:
        from fused_adamw.backends import triton

        self.backend, self.monkeypatch = triton, monkeypatch
        self.unmasked = self.watch_accesses()

    def watch_accesses(self) -> list[int]:
        """Sizes of the blocks accessed without a mask: a GPU moves 16 bytes at a time there, aligned."""
        from triton.runtime.interpreter import InterpreterBuilder

        accessed: list[int] = []

        def watch(name: str) -> None:
            original = getattr(InterpreterBuilder, name)

            def access(self, ptr, *args):
                if ptr.data.size > 1:
                    assert ptr.data[0] % 16 == 0
                    accessed.append(ptr.data.size)
                return original(self, ptr, *args)

            self.monkeypatch.setattr(InterpreterBuilder, name, access)

        watch("create_load")
        watch("create_store")
        return accessed

    def rtol(self, formats) -> float:
        """In float64 exp(n * log(beta)) stands for beta ** n."""
        return 1e-12 if formats[0] == F64 else 0.0

    def rounded(self, values: np.ndarray, dtype: int) -> np.ndarray:
        """The interpreter cuts off bits where a GPU rounds to nearest."""
        if dtype == BF16:
            return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return values

    def sum_of_squares(self, t: Tables, out: torch.Tensor, programs: int) -> None:
        self.monkeypatch.setattr(self.backend, "_INTERPRETED_PROGRAMS", programs)
        self.backend.sum_of_squares(t, t.chunks, out)

    def update(self, t: Tables, inputs: StepInputs, programs: int) -> None:
        self.monkeypatch.setattr(self.backend, "_INTERPRETED_PROGRAMS", programs)
        self.backend.update(t, inputs)


# ---- Sources, compiled by g++


def struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I64, P = ctypes.c_int64, ctypes.c_void_p
Table = struct("Table", rows=P, n_rows=I64, grads=P, chunks=P, n_chunks=I64, chunk_size=I64)
UpdateArgs = struct(
    "UpdateArgs",
    table=Table, hypers=P, n_hypers=I64, formats=I64 * 5,
    inputs=StepInputsStruct, stats=P, ticket=P,
)  # fmt: skip
NormArgs = struct("NormArgs", table=Table, grad=I64, partials=P, sum=P, ticket=P)
Device = struct("Device", seed=ctypes.c_uint, launches=ctypes.c_int, last_grid=ctypes.c_int)


def table_of(t: Tables) -> ctypes.Structure:
    chunks = (t.chunks.data_ptr(), len(t.chunks), t.chunk_size)
    return Table(t.rows.data_ptr(), len(t.rows), t.grads.data_ptr(), *chunks)


def update_args(t: Tables, inputs: StepInputs) -> ctypes.Structure:
    record = StepInputsStruct.from_buffer_copy(inputs.record.numpy())
    hypers = (t.hypers.data_ptr(), len(t.hypers))
    stats = t.stats.data_ptr() if len(t.stats) else 0
    return UpdateArgs(table_of(t), *hypers, (I64 * 5)(*t.formats), record, stats, t.workspace.data_ptr())


def build_cuda(*flags: str) -> ctypes.CDLL:
    """Compile the kernels into a library: an object for each parameter format, as setup.py does."""
    source = ROOT / "tests" / "cuda_emulation" / "library.cpp"
    usual = ("-O2", "-Wno-unknown-pragmas", "-pthread", f"-I{source.parent}", f"-I{ROOT / 'csrc'}")
    parts = tuple(
        (f"-DFUSED_ADAMW_PARAM={param}", "-x", "c++", ROOT / "csrc" / "cuda" / "update.cu")
        for param in ("Float32", "BFloat16", "Float16", "Float64", "StochasticBFloat16", "SplitBFloat16")
    )
    library = ctypes.CDLL(str(compiler.library(source, *usual, *flags, parts=parts)))
    library.norm.restype = library.update.restype = ctypes.c_char_p
    library.emulated_device.restype = ctypes.POINTER(Device)
    return library


class Cuda(Kernels):
    """The CUDA kernels. A grid is an emulated device: device d holds d + 1 blocks at once.

    Attributes:
        device: Tells what was launched.
        hypers_on_host: Whether they travel as kernel parameters.
    """

    block, chunk, norm_chunk = 1024, 2560, 10240  # 256 threads times the elements that each takes at a time
    grids = (0, 1, 2, 3)
    norm_rtol = 2e-7

    def __init__(self, library: ctypes.CDLL, hypers_on_host: bool = True) -> None:
        self.library, self.hypers_on_host = library, hypers_on_host
        self.device = library.emulated_device().contents

    def sum_of_squares(self, t: Tables, out: torch.Tensor, device: int) -> None:
        ticket = t.workspace.data_ptr()
        args = NormArgs(table_of(t), t.formats[1], ticket + 8, out.data_ptr(), ticket)
        self.run(self.library.norm, args, device)

    def update(self, t: Tables, inputs: StepInputs, device: int) -> None:
        before = self.device.launches
        self.run(self.library.update, update_args(t, inputs), self.hypers_on_host, device)
        assert self.device.launches == before + 1

    def run(self, launcher, args: ctypes.Structure, *options: int) -> None:
        if error := launcher(ctypes.byref(args), *options):
            raise RuntimeError(error.decode())


def build_instruction_set(name: str) -> Path:
    """Compile the CPU kernels for one of `ISAS` into a library."""
    source = Path(__file__).with_name("instruction_set.cpp")
    return compiler.library(source, "-O3", "-fno-math-errno", *ISAS[name][0])


class InstructionSet(Native):
    """The C++ kernels for one instruction set, as `build_instruction_set` made them, on one thread."""

    grids = (1, 1)

    def __init__(self, library: Path | str) -> None:
        self.library = ctypes.CDLL(str(library))

    def sum_of_squares(self, t: Tables, out: torch.Tensor, threads: int) -> None:
        ticket = t.workspace.data_ptr()
        args = NormArgs(table_of(t), t.formats[1], ticket + 8, out.data_ptr(), ticket)
        self.library.norm(ctypes.byref(args))

    def update(self, t: Tables, inputs: StepInputs, threads: int) -> None:
        self.library.update(ctypes.byref(update_args(t, inputs)))
