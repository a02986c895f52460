"""Builds `fused_adamw._C`: C++ for the CPU, and CUDA where there is an nvcc. Metadata is in pyproject.toml.

Environment:
    CUDA_HOME              where to look for nvcc; otherwise the one on PATH or in /usr/local/cuda is taken
    FUSED_ADAMW_CUDA       0: leave the CUDA part out even if there is an nvcc; 1: fail if there is none
    TORCH_CUDA_ARCH_LIST   architectures as torch spells them, such as "8.0;9.0+PTX"
    FUSED_ADAMW_SIMD       0: leave out the CPU kernels for AVX2 and AVX-512, which some compilers do not know
    FUSED_ADAMW_NVCC_FLAGS more flags for nvcc, such as the -D switches of csrc/cuda/switches.h
    CXX, LDFLAGS           the C++ compiler, and more for the linker
    FUSED_ADAMW_CXX_FLAGS  more for the C++ compiler, such as -fsanitize=address
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# torch >= 2.10 and Python >= 3.10 can load what these two produce.
TORCH_TARGET_VERSION = "0x020a000000000000"
PY_LIMITED_API = "0x030a0000"

# -fno-math-errno lets sqrt vectorise; without contraction the results do not depend on which
# instruction set has a fused multiply-add, and equal those of a plain float32 chain.
HARDENED = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", *HARDENED, f"-ffile-prefix-map={Path(__file__).parent}=."]
CXX_FLAGS = f"-std=c++17 -O3 -fno-math-errno -ffp-contract=off -Wall {' '.join(HOST_FLAGS)}"
# Compressed as every driver of CUDA 12 can read it; --compress-mode=size is smaller, and needs 12.4 drivers.
NVCC_FLAGS = f"-std=c++17 -O3 --fmad=false -Xfatbin -compress-all -Xcompiler {','.join(HOST_FLAGS)}"
LINK_FLAGS = "-Wl,-z,relro,-z,now,-z,noexecstack -Wl,--exclude-libs,ALL -Wl,--no-as-needed"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512"
CPU_CAPABILITIES = {
    "Baseline": "",
    "Avx2": "-mavx2 -mf16c",
    "Avx512": AVX512,
    "Avx512Bf16": f"{AVX512} -mavx512bf16",
}
CUDA_ARCHS = ("80", "90", "100", "120")
# What torch's names for architectures stand for.
ARCH_NAMES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"


def find_nvcc() -> str | None:
    """The nvcc to use, or None."""
    if os.environ.get("FUSED_ADAMW_CUDA") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=f"{home}/bin")
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and os.environ.get("FUSED_ADAMW_CUDA") == "1":
        raise SystemExit(
            "fused_adamw: FUSED_ADAMW_CUDA=1, but no nvcc found (CUDA_HOME, PATH, /usr/local/cuda)"
        )
    return nvcc


def listed_archs(text: str) -> tuple[list[str], list[str]]:
    """The architectures of a TORCH_CUDA_ARCH_LIST, such as 90, and those of them that PTX is wanted of."""
    for name, numbers in ARCH_NAMES.items():
        text = text.replace(name, numbers)
    archs, ptx = {}, {}  # in order, each once
    for item in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)((?:\+PTX)*)", item)
        if match is None:
            raise SystemExit(
                f"fused_adamw: TORCH_CUDA_ARCH_LIST has {item!r}: expected numbers such as 9.0 or 9.0+PTX, "
                f"or names, of {', '.join(ARCH_NAMES)}"
            )
        archs[match[1] + match[2]] = True
        if match[3]:
            ptx[match[1] + match[2]] = True
    return list(archs), list(ptx)


def gencode_flags(nvcc: str) -> str:
    """`-gencode` for each architecture; PTX of the newest, so that later GPUs are served too."""
    archs, ptx = listed_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known.split()]
        ptx = archs[-1:]
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"-gencode arch=compute_{arch},code=compute_{arch}" for arch in ptx]
    names = " ".join([f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in ptx])
    return " ".join([*flags, f"-DFUSED_ADAMW_CUDA_ARCHS='\"{names}\"'"])


def cuda_jobs(flags: str) -> list[tuple[str, str, Path, str]]:
    """One object for each parameter format of layouts.h, so that they compile in parallel, and two more."""
    cuda = CSRC / "cuda"
    params = dict.fromkeys(re.findall(r"Layout<(\w+),", (cuda / "layouts.h").read_text()))
    jobs = [(f"cuda_{name}.o", "nvcc", cuda / f"{name}.cu", flags) for name in ("norm", "dispatch")]
    for param in params:
        define = f"-DFUSED_ADAMW_PARAM={param}"
        jobs.append((f"cuda_update_{param}.o", "nvcc", cuda / "update.cu", f"{define} {flags}"))
    return jobs


def ninja_file(output: Path, build: Path) -> str:
    """The text of a build.ninja that makes `output`; paths in it are absolute."""
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "fused_adamw: torch is not there to build against, as pip builds in an environment of its own: "
            'pip install torch ninja "setuptools>=77", then pip install --no-build-isolation .'
        ) from None

    torch_dir = Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "c++")
    more_flags = os.environ.get("FUSED_ADAMW_CXX_FLAGS", "")
    compiler = subprocess.run(
        [cxx, "-dumpversion"], check=True, capture_output=True, text=True
    ).stdout.strip()
    nvcc = find_nvcc()
    x86 = platform.machine().lower() in ("x86_64", "amd64") and os.environ.get("FUSED_ADAMW_SIMD") != "0"
    python_flags = (
        f"-DPy_LIMITED_API={PY_LIMITED_API} -isystem {torch_dir}/include"
        f" -isystem {sysconfig.get_paths()['include']}"
    )
    torch_flags = (
        f"{python_flags} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        f" -DFUSED_ADAMW_COMPILER='\"{Path(cxx).name} {compiler}\"'"
    )
    torch_flags += " -DFUSED_ADAMW_X86" * x86 + " -DFUSED_ADAMW_CUDA" * bool(nvcc)

    jobs = [
        ("bindings.o", "cxx", CSRC / "torch" / "bindings.cpp", torch_flags),
        ("direct.o", "cxx", CSRC / "torch" / "direct.cpp", torch_flags),
        ("guard.o", "cxx", CSRC / "python" / "guard.cpp", python_flags),  # of torch's headers only DLPack's
        ("survey.o", "cxx", CSRC / "python" / "survey.cpp", python_flags),
    ]
    for name, flags in CPU_CAPABILITIES.items():
        if name == "Baseline" or x86:
            jobs.append(
                (f"cpu_{name}.o", "cxx", CSRC / "cpu" / "kernels.cpp", f"-DCPU_CAPABILITY={name} {flags}")
            )
    if nvcc:
        jobs += cuda_jobs(f"{gencode_flags(nvcc)} {os.environ.get('FUSED_ADAMW_NVCC_FLAGS', '')}")
    else:
        print(
            "fused_adamw: no nvcc found (CUDA_HOME, PATH, /usr/local/cuda): building the CPU kernels alone. "
            "On a GPU the Triton backend will serve. Install the CUDA toolkit and reinstall to have the CUDA "
            "kernels.",
            file=sys.stderr,
        )

    if sys.platform == "darwin":
        link_flags = f"-undefined dynamic_lookup -L{torch_dir}/lib -ltorch"
    else:
        # torch is loaded before the extension, so no rpath; libtorch alone brings the parts that are there.
        # -L for the linker alone: nvcc would write the folder into the library.
        link_flags = f"{LINK_FLAGS} -Wl,-L{torch_dir}/lib,-ltorch"
    link_flags = f"{os.environ.get('LDFLAGS', '')} {link_flags}"
    if nvcc:
        # nvcc knows where its static runtime is: no CUDA library is needed to import the extension.
        linker = f"{nvcc} -shared -cudart static"
        link_flags = re.sub(r"-Wl,(\S+)", r"-Xlinker \1", link_flags)
    else:
        linker = f"{cxx} -shared"

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {build}",
        "rule cxx",
        f"  command = {cxx} -MD -MF $out.d {CXX_FLAGS} {more_flags} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} -MD -MF $out.d {NVCC_FLAGS} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} $in -o $out {link_flags}",
    ]
    for obj, rule, source, flags in jobs:
        lines += [f"build {build / obj}: {rule} {source}", f"  flags = {flags}"]
    lines.append(f"build {output}: link {' '.join(str(build / job[0]) for job in jobs)}")
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Compiles through ninja: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension into the place that setuptools expects."""
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            raise SystemExit("fused_adamw: building needs ninja: pip install ninja")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # setuptools gives an editable build a folder of its own, and throws it away.
        build = (OBJECTS if self.editable_mode else Path(self.build_temp)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(output, build))
        subprocess.run([ninja, "-C", str(build)], check=True)


setup(
    ext_modules=[Extension("fused_adamw._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_temp": str(OBJECTS)}},
)
