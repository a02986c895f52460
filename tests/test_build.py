"""The build: what the extension links to, where it imports, and that a source distribution installs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "fused_adamw" / "_C.abi3.so"

INFO = "import torch, fused_adamw._C; print(torch.ops.fused_adamw.build_info())"


# An editable install would offer its own extension to the copy under test.
ONLY_HERE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"


def run(*command, **kwargs):
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    return done.stdout


def copy_sources(to: Path) -> None:
    """What a source distribution is made from: no .git, nothing built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "fused_adamw", "wheels"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    files = "setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md requirements-wheel.txt"
    for name in files.split():
        shutil.copy(ROOT / name, to / name)


@pytest.fixture
def setup_script(monkeypatch):
    """What setup.py defines, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("9.0", "sm_90"),
        ("9.0;", "sm_90"),
        (" 8.0;9.0+PTX ", "sm_80 sm_90 compute_90"),
        ("9.0a 12.0", "sm_90a sm_120"),
        ("Hopper", "sm_90 compute_90"),
        ("Ampere;Hopper", "sm_80 sm_86 sm_90 compute_86 compute_90"),
        ("9.0;9.0;9.0+PTX", "sm_90 compute_90"),
    ],
)
def test_architectures_are_listed_as_for_torch(setup_script, monkeypatch, text, archs):
    """The build says which they are, and nvcc is given a flag for each."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    flags = setup_script["gencode_flags"]("no nvcc is asked")
    assert re.findall(r"-DFUSED_ADAMW_CUDA_ARCHS='\"(.*)\"'", flags) == [archs]
    assert re.findall(r"-gencode arch=compute_\w+,code=(\w+)", flags) == archs.split()


def test_an_unknown_architecture_is_named(setup_script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;Hoper")
    with pytest.raises(SystemExit, match=r"'Hoper': expected numbers such as 9\.0"):
        setup_script["gencode_flags"]("no nvcc is asked")


def without_nvcc() -> dict[str, str]:
    return {**os.environ, "FUSED_ADAMW_CUDA": "0"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_library_needs_no_cuda_driver_nor_libpython():
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", str(LIBRARY)))
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.search("cuda|nvidia|python|torch_python", name)]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_library_is_hardened():
    """What torch's cpp_extension leaves out."""
    headers = run("readelf", "-lW", str(LIBRARY))
    assert "GNU_RELRO" in headers
    assert "NOW" in run("readelf", "-d", str(LIBRARY))
    assert not re.search(r"GNU_STACK.* RWE ", headers)
    symbols = run("readelf", "--dyn-syms", "-W", str(LIBRARY))
    assert "__stack_chk_fail" in symbols
    assert "RPATH" not in run("readelf", "-d", str(LIBRARY))
    exported = re.findall(r"(?:FUNC|OBJECT) +GLOBAL DEFAULT +\d+ (\S+)", symbols)
    assert [name for name in exported if not name.startswith("_Z")] == ["PyInit__C"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_uses_the_stable_abi_alone():
    undefined = run("nm", "-D", "--undefined-only", "--demangle", str(LIBRARY))
    assert not re.search(r"\b(c10|at|caffe2)::", undefined)
    # Absent from a CPU-only torch: a weak symbol, or the import would fail there.
    for line in undefined.splitlines():
        if "cuda_stream" in line:
            assert line.split()[0] == "w"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_library_asks_nothing_of_torch_that_2_10_has_not():
    """Whichever torch it was built with."""
    undefined = run("nm", "-D", "--undefined-only", str(LIBRARY))
    listed = (Path(__file__).parent / "torch_2_10_abi.txt").read_text().splitlines()
    asked = set(re.findall(r"\b(?:aoti_)?torch_\w+", undefined))
    assert asked
    assert asked <= set(listed)


def test_python_api_is_a_part_of_the_stable_one():
    undefined = run("nm", "-D", "--undefined-only", str(LIBRARY))
    module = "Module_Create2 Capsule_New Capsule_GetPointer Capsule_GetContext Capsule_SetContext"
    module += " _NoneStruct _TrueStruct _IncRef _DecRef Type_GetFlags"
    errors = "Err_Occurred Err_Clear Err_Format Err_SetString Err_NoMemory Err_ExceptionMatches"
    errors += " Exc_Exception Exc_RuntimeError Exc_TypeError Exc_ValueError Exc_NotImplementedError"
    values = "Long_AsLongLong Long_FromLongLong Long_AsUnsignedLongLongMask Long_AsVoidPtr"
    values += " Unicode_InternFromString Bytes_FromStringAndSize Bytes_AsString Bytes_Size"
    containers = "Dict_Next List_New List_Size List_GetItem List_SetItem List_Append"
    containers += " Tuple_Size Tuple_GetItem Tuple_Pack"
    objects = "GetAttr GetAttrString HasAttr CallMethod CallMethodObjArgs RichCompareBool IsTrue"
    known = {*module.split(), *errors.split(), *values.split(), *containers.split()}
    known |= {f"Object_{name}" for name in objects.split()}
    assert set(re.findall(r"\b_?Py(\w+)", undefined)) <= known


def test_source_distribution_installs_and_imports(tmp_path):
    copy_sources(tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tmp_path)
    (archive,) = (tmp_path / "dist").iterdir()
    site = tmp_path / "site"
    log = run(
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"),
        *("--disable-pip-version-check", "--target", str(site), str(archive)),
        env={**without_nvcc(), "FUSED_ADAMW_SIMD": "0"},
    )
    assert "no nvcc found" in log
    env = {**os.environ, "PYTHONPATH": str(site)}
    out = run(
        sys.executable, "-c", ONLY_HERE + INFO + "; print(fused_adamw.__file__)", cwd=tmp_path.parent, env=env
    )
    assert '"cpu_capability": "Baseline"' in out
    assert '"cuda_version": "", "cuda_archs": ""' in out
    assert str(site) in out
    assert (site / "fused_adamw" / "py.typed").exists()
    # Without CUDA kernels, a GPU is told why.
    why = (
        ONLY_HERE
        + "from fused_adamw.backends import native; import torch\n"
        + "print(native.unavailable_reason(torch.device('cuda')))"
    )
    assert "no nvcc was found" in run(sys.executable, "-c", why, cwd=tmp_path.parent, env=env)


def test_without_the_extension_the_reference_serves(tmp_path):
    copy_sources(tmp_path)
    code = ONLY_HERE + (
        "import torch, fused_adamw; from fused_adamw import FusedHygieneAdamW\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "FusedHygieneAdamW([p]).step(); assert p[0] < 1\n"
        "try: FusedHygieneAdamW([p], backend='native')\n"
        "except RuntimeError as e: print(e)\n"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "the extension is not built or does not load" in out
    assert re.search("Available: .*reference", out)


def test_import_writes_nothing_and_starts_nothing():
    code = (
        "import sys, torch\n"
        "def hook(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'socket.connect'): raise SystemExit(event)\n"
        "    if event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+'):\n"
        "        if '__pycache__' not in str(args[0]): raise SystemExit(f'writes {args[0]}')\n"
        "sys.addaudithook(hook)\n"
        "import fused_adamw; fused_adamw.available_backends()"
    )
    subprocess.run([sys.executable, "-B", "-c", code], check=True, cwd=ROOT)


def test_a_build_without_torch_says_in_a_sentence_what_to_do(tmp_path):
    """As `pip install .` runs it without --no-build-isolation, in an environment of its own."""
    copy_sources(tmp_path)
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=without_nvcc(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("fused_adamw: torch is not there to build against")
    assert done.stderr.rstrip().endswith("pip install --no-build-isolation .")


def test_a_build_that_must_have_cuda_fails_without_nvcc(setup_script, monkeypatch):
    """As a wheel must: built by chance without it, nobody would notice."""
    monkeypatch.setenv("FUSED_ADAMW_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match="FUSED_ADAMW_CUDA=1, but no nvcc found"):
        setup_script["find_nvcc"]()
