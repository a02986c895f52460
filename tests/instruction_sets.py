"""The instruction sets that the CPU kernels are compiled for."""

from pathlib import Path

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"]
# The compiler's flags, and what /proc/cpuinfo calls it.
ISAS = {
    "baseline": ([], ""),
    "avx2": (["-mavx2", "-mf16c"], "avx2"),
    "avx512": (_AVX512, "avx512vl"),
    "avx512bf16": ([*_AVX512, "-mavx512bf16"], "avx512_bf16"),
}


def has_isa(name: str) -> bool:
    """Whether this processor has it."""
    feature, cpuinfo = ISAS[name][1], Path("/proc/cpuinfo")
    return not feature or (cpuinfo.exists() and f" {feature} " in cpuinfo.read_text())
