"""Builds the pretend runtime and driver, and the extension against them, into build/pretend_gpu."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "pretend_gpu"
LIB = BUILD / "lib"
EXTENSION = BUILD / "extension" / "fused_adamw" / "_C.abi3.so"
CXX_FLAGS = "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall"


def package_dir(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pretend GPU: {name} is not installed in this environment")
    return Path(spec.submodule_search_locations[0])


def symbols_of_torch() -> tuple[str, set[str], set[str]]:
    """What torch's libraries take from CUDA: name of the runtime library, its functions, the driver's."""
    libraries = sorted((package_dir("torch") / "lib").glob("*.so"))
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    undefined = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versioned = re.findall(r" U (\w+)@(libcudart\.so\.\d+)", undefined)
    if not versioned:
        raise SystemExit("pretend GPU: the torch that is installed here was built without CUDA")
    driver = set(re.findall(r" U (cu[A-Z]\w+)$", undefined, re.MULTILINE))
    return versioned[0][1], {name for name, _ in versioned}, driver


def stubs(wanted: set[str], sources: list[Path]) -> str:
    """C++ that defines what the sources do not; every such function says that it is not supported."""
    written = "".join(source.read_text() for source in sources)
    missing = sorted(name for name in wanted if not re.search(rf"EXPORTED [^;{{]*\b{name}\(", written))
    kind = 'extern "C" __attribute__((visibility("default"))) int'
    return "".join(f"{kind} {name}() {{ return 801; }}  // NotSupported\n" for name in missing)


def write_if_changed(path: Path, text: str) -> Path:
    """Write a file, unless it says so already: ninja would build again what depends on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def ninja_file() -> str:
    """The text of a build.ninja that makes the three libraries."""
    soname, runtime_symbols, driver_symbols = symbols_of_torch()
    runtime = [HERE / "runtime" / f"{name}.cpp" for name in ("gpu", "memory", "streams", "device")]
    driver = [HERE / "runtime" / "driver.cpp"]
    runtime_stubs = write_if_changed(BUILD / "runtime_stubs.cpp", stubs(runtime_symbols, runtime))
    driver_stubs = write_if_changed(BUILD / "driver_stubs.cpp", stubs(driver_symbols, driver))
    version = write_if_changed(BUILD / "version.map", f"{soname} {{ global: *; }};\n")
    torch, cuda = package_dir("torch"), package_dir("triton") / "backends" / "nvidia" / "include"
    c10 = f"-isystem {torch}/include -L{torch}/lib -lc10_cuda -lc10 -Wl,-rpath,{torch}/lib"
    libraries = {
        LIB / soname: ([*runtime, runtime_stubs], f"-Wl,--version-script={version} -Wl,-soname,{soname}"),
        LIB / "libcuda.so.1": ([*driver, driver_stubs], "-Wl,-soname,libcuda.so.1"),
        LIB / "blocks.so": ([HERE / "runtime" / "blocks.cpp"], c10),
    }
    lines = [
        "rule library",
        f"  command = {os.environ.get('CXX', 'g++')} -MMD -MF $out.d {CXX_FLAGS} -shared -isystem {cuda} $in"
        " -o $out $flags",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for library, (sources, flags) in libraries.items():
        lines += [f"build {library}: library {' '.join(map(str, sources))}", f"  flags = {flags}"]
    return "\n".join(lines) + "\n"


def runtime_library() -> Path:
    """The pretend runtime, once it is built."""
    (library,) = LIB.glob("libcudart.so.*[0-9]")
    return library


def run(command: list[str], **options: Any) -> None:
    """Run a command of the build; what it prints is shown where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}pretend GPU: the build failed")


def build() -> None:
    """Build everything that is out of date."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise SystemExit("pretend GPU: building needs ninja")
    LIB.mkdir(parents=True, exist_ok=True)
    write_if_changed(BUILD / "build.ninja", ninja_file())
    run([ninja, "-C", str(BUILD)])
    if not (LIB / "libcuda.so").exists():  # Triton's compiler links to this name
        (LIB / "libcuda.so").symlink_to("libcuda.so.1")
    environment = {
        **os.environ,
        "CUDA_HOME": str(HERE / "toolkit"),
        "PRETEND_GPU_RUNTIME": str(runtime_library()),
        "TORCH_CUDA_ARCH_LIST": "",
    }
    setup = [sys.executable, "setup.py", "--quiet", "build_ext"]
    places = ["--build-lib", str(EXTENSION.parent.parent), "--build-temp", str(BUILD / "objects")]
    run([*setup, *places], cwd=ROOT, env=environment)


if __name__ == "__main__":
    build()
