"""The code that the kernels of the Triton backend compile to."""

import contextlib
import re
import subprocess
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fused_adamw.backends import triton as backend  # noqa: E402
from fused_adamw.tables import (  # noqa: E402
    ChunkStatsStruct,
    HyperStruct,
    RowStruct,
    SpikeOptions,
    StepInputs,
    Tables,
    status_words,
    words,
)

NONE, F32, BF16, F16, F64, STOCHASTIC, SPLIT, SIGNED, UNSIGNED = range(-1, 8)  # enum FormatCode


class Launches:
    """Stands in for a GPU: launches compile for its architecture, and end there."""

    def __init__(self, monkeypatch, arch: int) -> None:
        self.arch, self.grids, self.kernels = arch, [], []
        run = triton.JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **options):
            self.grids.append(grid)
            self.kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))

        monkeypatch.setattr(triton.runtime.driver, "_active", self)
        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        monkeypatch.setattr(backend, "_multiprocessors", lambda device: 100)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90, 100], ids="sm_{}".format)
def gpu(request, monkeypatch):
    return Launches(monkeypatch, request.param)


def zeros(*shape: int, dtype: torch.dtype = torch.float64, shift: int = 0) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.zeros(size + shift, dtype=dtype)[shift:].view(shape)


def tables(formats, n_chunks, shift, average=NONE, stats=False) -> Tables:
    """Tables whose tensors are `shift` elements off an aligned address."""
    return Tables(
        rows=zeros(5, words(RowStruct), dtype=torch.int64, shift=shift),
        grads=zeros(5, dtype=torch.int64, shift=shift),
        chunks=zeros(n_chunks, 2, dtype=torch.int32, shift=shift),
        chunk_size=backend.CHUNK_SIZE,
        hypers=zeros(2, words(HyperStruct), shift=shift),
        formats=(*formats, average),
        workspace=zeros(1 + n_chunks, shift=shift),
        stats=zeros(n_chunks * stats, words(ChunkStatsStruct), shift=shift),
    )


def update(gpu, formats, n_chunks=3, shift=0, n_sums=1, given=True, skip_nonfinite=True, window=0, **besides):
    """The compiled update kernel. `shift`: how many elements tensors are off an aligned address."""
    optional = zeros(1, dtype=torch.float32, shift=shift) if given else None
    inputs = StepInputs(
        status=zeros(status_words(window), shift=shift),
        sums=zeros(n_sums, shift=shift) if given else None,
        max_grad_norm=1.0,
        grad_scale=optional,
        found_inf=optional,
        skip_nonfinite=skip_nonfinite,
        loss=zeros(1, shift=shift) if given and window else None,
        spikes=SpikeOptions(6.0, window, min(window, 10), clips=False),
    )
    backend.update(tables(formats, n_chunks, shift, **besides), inputs)
    return gpu.kernels[-1]


def norm(gpu, dtype, n_chunks=3, shift=0):
    t = tables((dtype,) * 4, n_chunks, shift)
    backend.sum_of_squares(t, t.chunks, zeros(1, shift=shift))
    return gpu.kernels[-1]


def accesses(kernel, instruction: str) -> int:
    """How often the PTX has an instruction without a predicate: the branches without masks."""
    return len(re.findall(rf"^\s*{re.escape(instruction)} ", kernel.asm["ptx"], re.MULTILINE))


def cuobjdump(kernel, what: str, tmp_path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def resources(kernel, tmp_path) -> dict[str, int]:
    """What ptxas allocated, such as {"REG": 64, "STACK": 0, "LOCAL": 0}."""
    usage = cuobjdump(kernel, "-res-usage", tmp_path)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}


def block_loops(kernel, tmp_path) -> list[list[str]]:
    """The machine instructions of each loop over whole blocks: innermost, with accesses of 16 bytes."""
    listing = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", cuobjdump(kernel, "-sass", tmp_path))
    code = [(int(address, 16), instruction) for address, instruction in listing]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.* 0x(\w+)$", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    innermost = [
        (first, last)
        for first, last in loops
        if not any(first <= start and end <= last for start, end in loops if (start, end) != (first, last))
    ]
    bodies = [[text for at, text in code if first <= at <= last] for first, last in innermost]
    return [body for body in bodies if accesses_of(body, "LDG.E.128")]


def arithmetic(body: list[str]) -> Counter[str]:
    """How often the body adds, multiplies and so on: ptxas is free to copy and pack registers."""
    return Counter(re.findall(r"\b(?:[FD](?:ADD|MUL|FMA|SETP)|MUFU)\b", "\n".join(body)))


def accesses_of(body: list[str], *instructions: str) -> int:
    return sum(instruction in text for text in body for instruction in instructions)


# Bytes spilled once for a chunk of thousands of elements, outside of the loops.
STACK = 40
SAME = [(F32,) * 4, (BF16,) * 4]
MIXED = [(BF16, F32, F32, F32), (BF16, BF16, F32, F32)]


@pytest.mark.parametrize("formats", SAME, ids=["float32", "bfloat16"])
def test_update_moves_16_bytes_per_access(gpu, formats):
    kernel = update(gpu, formats)
    # Four tensors are read and three written, one more of each in the branch for amsgrad.
    assert accesses(kernel, "ld.global.v4.b32") == 4 + 5
    assert accesses(kernel, "st.global.v4.b32") == 3 + 4


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_moves_16_bytes_per_access(gpu, dtype):
    assert accesses(norm(gpu, dtype), "ld.global.v4.b32") == 2


@pytest.mark.parametrize("formats", SAME + MIXED, ids=["float32", "bfloat16", "bfloat16-1", "bfloat16-2"])
def test_update_fits_its_registers(gpu, formats, tmp_path):
    kernel = update(gpu, formats)
    used = resources(kernel, tmp_path)
    assert used["REG"] <= backend._REGISTERS
    assert used["LOCAL"] == 0
    assert used["STACK"] <= STACK
    plain, amsgrad = sorted(block_loops(kernel, tmp_path), key=lambda body: accesses_of(body, "LDG.E.128"))
    assert accesses_of(plain, "LDL", "STL") == 0, "spilled"
    # Four registers of bfloat16.
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    is_known = gpu.arch == 80 and BF16 in formats and version >= (3, 9)
    assert accesses_of(amsgrad, "LDL", "STL") <= (8 if is_known else 0), "spilled"
    assert "convert_layout" not in kernel.asm["ttgir"], "values pass between threads"


SPECIAL = [
    (SPLIT, BF16, BF16, STOCHASTIC),
    (STOCHASTIC, BF16, F32, F32),
    (F32, F32, SIGNED, UNSIGNED),
    (SPLIT, BF16, SIGNED, UNSIGNED),
]


@pytest.mark.parametrize("formats", SPECIAL, ids=str)
def test_special_formats_fit_their_registers(gpu, formats, tmp_path):
    """As above; no fast divisions and roots."""
    kernel = update(gpu, formats)
    used = resources(kernel, tmp_path)
    assert used["REG"] <= backend._SPECIAL_REGISTERS
    assert used["LOCAL"] == 0
    assert used["STACK"] <= STACK
    names = set(re.findall(r"\b(?:fma|div|rcp|sqrt|rsqrt)\.[\w.]*f32", kernel.asm["ptx"]))
    assert names == {"div.rn.f32", "sqrt.rn.f32"}


BESIDES = {
    "stats": {"stats": True},
    "average": {"average": F32},
    "both": {"average": STOCHASTIC, "stats": True},
    "guard": {"window": 100},
}


@pytest.mark.parametrize("besides", BESIDES.values(), ids=BESIDES.keys())
@pytest.mark.parametrize("formats", [(F32,) * 4, (BF16,) * 4, (SPLIT, BF16, SIGNED, UNSIGNED)], ids=str)
def test_besides_fit_their_registers(gpu, formats, besides, tmp_path):
    kernel = update(gpu, formats, **besides)
    used = resources(kernel, tmp_path)
    special = (SIGNED in formats) + ("window" not in besides)
    most = (backend._REGISTERS, backend._SPECIAL_REGISTERS, backend._MOST_REGISTERS)[special]
    assert used["REG"] <= most
    assert used["LOCAL"] == 0
    assert used["STACK"] <= STACK
    for body in block_loops(kernel, tmp_path):
        assert accesses_of(body, "LDL", "STL") == 0, "spilled"


def test_the_average_moves_16_bytes_per_access(gpu):
    kernel = update(gpu, (F32,) * 4, average=F32)
    assert accesses(kernel, "ld.global.v4.b32") == 4 + 5 + 2
    assert accesses(kernel, "st.global.v4.b32") == 3 + 4 + 2


def test_float64_has_stats_and_averages(gpu):
    update(gpu, (F64,) * 4, average=F64, stats=True, window=5)


@pytest.mark.parametrize("formats", SAME, ids=["float32", "bfloat16"])
def test_a_guard_is_not_in_the_loops(gpu, formats, tmp_path):
    """It is the last program's: no access and no arithmetic more."""
    kernels = [update(gpu, formats, window=window) for window in (100, 0)]
    loops = [block_loops(kernel, tmp_path) for kernel in kernels]
    counts = [[accesses_of(body, "LDG", "STG", "LDL", "STL") for body in bodies] for bodies in loops]
    assert counts[0] == counts[1]
    for with_guard, without in zip(*loops, strict=True):
        assert arithmetic(with_guard) == arithmetic(without) != Counter()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norm_fits_its_registers(gpu, dtype, tmp_path):
    used = resources(norm(gpu, dtype), tmp_path)
    assert used["REG"] <= backend._REGISTERS
    assert used["STACK"] == used["LOCAL"] == 0, "spilled"


def test_arithmetic_is_ieee_and_not_contracted(gpu):
    ptx = update(gpu, (F32,) * 4).asm["ptx"]
    arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|div|rcp|sqrt|rsqrt)\.[\w.]*f32", ptx))
    assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}


def test_ticket_is_drawn_when_all_threads_are_done(gpu):
    for kernel in (update(gpu, (F32,) * 4), norm(gpu, F32)):
        before, after = kernel.asm["ptx"].split("atom.global.gpu.acq_rel.add.u32")
        assert before.rfind("bar.sync") > max(before.rfind("ld.global"), before.rfind("st.global"))
        assert after.find("bar.sync") < after.find("global.")


def test_one_binary_serves_all_tables(gpu):
    first = update(gpu, (F32,) * 4)
    for changes in ({"n_chunks": 1}, {"n_chunks": 16}, {"shift": 1}, {"n_sums": 5}):
        assert update(gpu, (F32,) * 4, **changes) is first
    besides = {"average": F32, "stats": True}
    first = update(gpu, (F32,) * 4, window=100, **besides)
    for changes in ({"window": 1}, {"window": 16}, {"shift": 1}, {"n_chunks": 1}):
        assert update(gpu, (F32,) * 4, **{"window": 100, **besides, **changes}) is first
    first = norm(gpu, F32)
    assert norm(gpu, F32, n_chunks=1) is norm(gpu, F32, n_chunks=16) is norm(gpu, F32, shift=1) is first


def test_options_cost_nothing_where_absent(gpu):
    everything = update(gpu, (F32,) * 4)
    nothing = update(gpu, (F32,) * 4, given=False, skip_nonfinite=False)
    assert len(nothing.asm["ptx"]) < len(everything.asm["ptx"])


def test_max_grad_norm_travels_in_double(gpu):
    signature = update(gpu, (F32,) * 4).src.signature
    assert signature["max_grad_norm"] == "fp64"


def test_grid(gpu):
    """One program per chunk, at least one, and no more than the device holds at once."""
    for n_chunks in (0, 1, 7, 10**5):
        update(gpu, (F32,) * 4, n_chunks)
    assert gpu.grids == [(1,), (1,), (7,), (100 * backend._PROGRAMS_PER_SM,)]


@pytest.mark.parametrize("formats", [(F32, F32, BF16, BF16), (F16, F16, F32, F32), (F16,) * 4, (F64,) * 4])
def test_other_types_compile(gpu, formats):
    kernel = update(gpu, formats)
    vectors = accesses(kernel, "ld.global.v4.b32") + accesses(kernel, "ld.global.v2.b64")
    assert vectors >= 4
    single = re.search(r"\b(?:div|sqrt|mul)\.[\w.]*f32", kernel.asm["ptx"])
    assert (single is None) == (formats[0] == F64), "float64 is stepped in float64"


def test_unavailable_reason(monkeypatch):
    assert "TRITON_INTERPRET=1" in backend.unavailable_reason(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend.unavailable_reason(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.unavailable_reason(torch.device("cuda")) is None
    assert "mps" in backend.unavailable_reason(torch.device("mps"))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.6" in backend.unavailable_reason(torch.device("cuda"))
