"""What nvcc makes of the formats: operations that round as IEEE 754 says, no others."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compiler import ENVIRONMENT

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = """
#include "formats.h"
#include "noise.h"
using namespace fused_adamw;
template <typename Code>
__device__ void step(typename Code::Stored* values, float* side, float* x, NoiseKey key) {
  *x += Code::load(*values, *side, Code::root_per_code(*side));
  *side = Code::side(Code::magnitude(*x));
  *values = Code::store(*x, *side, Code::codes_per_root(*side), noise_bits(key, threadIdx.x) & 0xffff);
}
extern "C" __global__ void kernel(int8_t* m, uint8_t* v, uint16_t* p, int16_t* low, float* side, float* x) {
  const NoiseKey key = noise_key(1, 2);
  step<SignedRoot>(m, side, x, key);
  step<UnsignedRoot>(v, side + 1, x, key);
  *x += SplitBFloat16::load(*p, *low);
  *p = SplitBFloat16::store(*x, *low);
  p[1] = StochasticBFloat16::store(StochasticBFloat16::load(p[1]) + *x, noise_bits(key, 3) >> 16);
}
"""


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_operations_on_a_gpu_are_rounded_once(tmp_path):
    source, out = tmp_path / "formats.cu", tmp_path / "formats.ptx"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=sm_80", "-ptx", f"-I{CSRC}"]
    subprocess.run([NVCC, *flags, "-o", out, source], check=True, env=ENVIRONMENT)
    ptx = out.read_text()
    operations = set(re.findall(r"^\s*(?:@\S+\s+)?((?:sqrt|div|mul|add|rcp|fma|cvt)\S*f32\S*)", ptx, re.M))
    assert {"sqrt.rn.f32", "div.rn.f32"} <= operations
    assert not [name for name in operations if re.search(r"approx|ftz|full|^rcp|^fma", name)]
