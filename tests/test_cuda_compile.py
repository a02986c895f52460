"""What nvcc makes of csrc/cuda: no warnings, no spills, 16-byte accesses. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from format_codes import CUDA_LAYOUTS

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(
    NVCC is None or shutil.which("c++filt") is None, reason="needs nvcc and binutils"
)

CUDA = ROOT / "csrc" / "cuda"
# Bytes of a value, and of what is kept beside each.
BYTES = {
    "Float32": [4],
    "Float64": [8],
    "BFloat16": [2],
    "Float16": [2],
    "StochasticBFloat16": [2],
    "SplitBFloat16": [2, 2],
    "RootCode<signed": [1],
    "RootCode<unsigned": [1],
}
PARAMS = [format for format in BYTES if "Code" not in format]
# As setup.py compiles them: one object for each parameter format.
SOURCES = {"norm": [CUDA / "norm.cu"]} | {
    f"update {param}": [f"-DFUSED_ADAMW_PARAM={param}", CUDA / "update.cu"] for param in PARAMS
}
COUNTS = {"update": len(CUDA_LAYOUTS), "update with besides": len(CUDA_LAYOUTS), "norm": 4}


def nvcc(*arguments: object) -> str:
    """Compile as anyone would by hand; returns what the compiler says."""
    command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def known(arch: int) -> bool:
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return f"compute_{arch}" in listed.split()


def kernel_of(mangled: str) -> tuple[str, list[str]]:
    """What a symbol is, one of `COUNTS`, and the formats that it is for."""
    symbol = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    kind, formats = re.search(r"::(norm|update)_kernel<(.*)>\(", symbol).groups()
    kind += " with besides" * ("WithBesides" in formats)
    return kind, re.findall(rf"\b(?:{'|'.join(BYTES)})", formats)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The PTX files of a function of an architecture, compiled once."""
    folder, made = tmp_path_factory.mktemp("ptx"), {}

    def get(arch: int) -> list[Path]:
        if arch not in made:
            made[arch] = []
            for name, source in SOURCES.items():
                made[arch].append(folder / f"{arch} {name}.ptx")
                nvcc(f"-arch=compute_{arch}", "-ptx", "-o", made[arch][-1], *source)
        return made[arch]

    return get


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in (80, 90, 100, 120)]
)
def test_no_spills(arch, ptx, tmp_path):
    """Nor a stack: an array indexed at run time would live in local memory."""
    if not known(arch):
        pytest.skip(f"this nvcc does not know sm_{arch}")
    said = "".join(
        nvcc(f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out.cubin", source)
        for source in ptx(arch)
    )
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert len(kernels) == sum(COUNTS.values()), said
    for symbol, stack, stores, loads, registers in kernels:
        kind, formats = kernel_of(symbol)
        print(f"sm_{arch} {kind:19} {' '.join(formats):30} {registers:>4} registers")
        # Averages and stats beside a master: a value that newer GPUs keep in their first cache.
        most = 8 if kind == "update with besides" and formats[0] == "SplitBFloat16" and arch >= 100 else 0
        spilled = max(map(int, (stack, stores, loads)))
        assert spilled <= most, f"{kind} of {formats} spills {spilled} bytes on sm_{arch}"


def accesses(kind: str, formats: list[str]) -> list[str]:
    """The vector accesses that a kernel must have: the widest format in 16 bytes, the others in as many."""
    vector = {16: "v4.u32", 8: "v2.u32", 4: "u32", 2: "u16"}
    if kind == "norm":
        return 4 * [f"ld.global.ca.{vector[16]}"]
    p, g, m, v = (BYTES[name] for name in formats)
    # An average may be float32, or bfloat16 where it is not float64.
    averages = {"update": [], "update with besides": [8] if formats[0] == "Float64" else [4, 2]}[kind]
    n = 16 // max(p + g + m + v + averages)
    loads, stores = [*p, *g, *m, *v, *averages], [*p, *m, *v, *averages]
    if (
        m != BYTES["RootCode<signed"]
    ):  # amsgrad's v_max, which is kept as m is: in the loop, or in one of its own
        loops = 1 if averages else 2
        loads, stores = loops * loads + m, loops * stores + m
    return [f"ld.global.ca.{vector[b * n]}" for b in loads] + [
        f"st.global.wb.{vector[b * n]}" for b in stores
    ]


def test_vector_accesses(ptx):
    """Every kernel moves its widest type in 16 bytes at a time, and the others in as many elements."""
    found = []
    text = "".join(file.read_text() for file in ptx(90))
    for symbol, body in re.findall(r"\.entry (\w+)\(.*?^\{(.*?)^\}", text, re.DOTALL | re.MULTILINE):
        kind, formats = kernel_of(symbol)
        found.append(kind)
        for access, expected in Counter(accesses(kind, formats)).items():
            count = len(re.findall(re.escape(access) + r"\s", body))
            assert count >= expected, f"{kind} of {formats}: {count} of {expected} {access}"
        generic = re.findall(r"\b(?:ld|st)\.v\d\S+", body)
        assert not generic, f"{kind} of {formats}: accesses that are not known to be global: {generic}"
    assert Counter(found) == COUNTS
