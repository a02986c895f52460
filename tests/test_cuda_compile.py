"""What nvcc makes of csrc/adamw_cuda.cu: no warnings, no spills, 16-byte accesses. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")

UPDATE_KERNELS, NORM_KERNELS = 11, 4


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


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The PTX of a function of an architecture, compiled once."""
    folder, made = tmp_path_factory.mktemp("ptx"), {}

    def get(arch: int) -> Path:
        if arch not in made:
            made[arch] = folder / f"{arch}.ptx"
            nvcc(f"-arch=compute_{arch}", "-ptx", "-o", made[arch], ROOT / "csrc" / "adamw_cuda.cu")
        return made[arch]

    return get


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in (80, 90, 100, 120)]
)
def test_no_spills(arch, ptx, tmp_path):
    """Nor a stack: an array indexed at run time would live in local memory."""
    if not known(arch):
        pytest.skip(f"this nvcc does not know sm_{arch}")
    said = nvcc(f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "out.cubin", ptx(arch))
    kernels = re.findall(
        r"entry function '\w*?(norm|update)_kernelI(\w+?)EEvNS.*?(\d+) bytes stack frame, (\d+) bytes spill"
        r" stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert len(kernels) == UPDATE_KERNELS + NORM_KERNELS, said
    for kind, types, stack, stores, loads, registers in kernels:
        print(f"sm_{arch} {kind:6} {types:40} {registers:>4} registers")
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kind}_kernel<{types}> spills on sm_{arch}"


def test_vector_accesses(ptx):
    """Every kernel moves its widest type in 16 bytes at a time, and the others in as many elements."""
    size = {"f": 4, "13__nv_bfloat16": 2, "6__half": 2, "d": 8}
    vector = {16: "v4.u32", 8: "v2.u32", 4: "u32", 2: "u16"}
    updates = norms = 0
    for name, body in re.findall(
        r"\.entry (\w+)\(.*?^\{(.*?)^\}", ptx(90).read_text(), re.DOTALL | re.MULTILINE
    ):
        kind, types = re.search(r"(norm|update)_kernelI(\w+?)EEvNS", name).groups()
        types = re.findall(r"13__nv_bfloat16|6__half|f|d|S\d?_", types)
        # A repeated type is mangled as a reference to its first mention.
        types = [next(t for t in types if "__" in t) if t.startswith("S") else t for t in types]
        loads = [f"ld.global.ca.{vector[16]}"]
        stores = []
        if kind == "update":
            updates += 1
            p, g, s = (size[t] for t in types)
            n = 16 // max(p, g, s)
            # The plain loop and the amsgrad one; p, g, m, v and v_max.
            loads = 2 * [f"ld.global.ca.{vector[b * n]}" for b in (p, g, s, s)] + [
                f"ld.global.ca.{vector[s * n]}"
            ]
            stores = 2 * [f"st.global.wb.{vector[b * n]}" for b in (p, s, s)] + [
                f"st.global.wb.{vector[s * n]}"
            ]
        else:
            norms += 1
            loads *= 4
        for access in {*loads, *stores}:
            expected = (loads + stores).count(access)
            found = len(re.findall(re.escape(access) + r"\s", body))
            assert found >= expected, f"{name}: {found} of {expected} {access}"
        generic = re.findall(r"\b(?:ld|st)\.v\d\S+", body)
        assert not generic, f"{name}: accesses that are not known to be global: {generic}"
    assert (updates, norms) == (UPDATE_KERNELS, NORM_KERNELS)
