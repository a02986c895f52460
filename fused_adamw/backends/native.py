"""The C++ and CUDA kernels, `torch.ops.fused_adamw.*`: the dispatcher picks by the device of the tables."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..device import NO_GPU, capability_of, has_gpu, is_gpu, refusal_of_runtime
from ..extension import load_extension
from ..formats import Formats
from ..tables import StepInputs, Tables, format_codes

# Elements per chunk: large enough that the walk costs nothing, small enough to share out one tensor. On a
# GPU, below so many elements in all, smaller ones, so that every processor has some: which ones is not yet
# measured, and FUSED_ADAMW_SMALL_CHUNKS="16384,67108864" tries others.
_CHUNK_SIZE = 1 << 15
_SMALL_CHUNKS = os.environ.get("FUSED_ADAMW_SMALL_CHUNKS", "8192,16777216")
_SMALL_CHUNK_SIZE, _SMALL_MODEL = map(int, _SMALL_CHUNKS.split(","))
# kMaxInlineHypers: these travel as kernel parameters.
_MAX_INLINE_HYPERS = 60


@functools.cache
def _load_error() -> str | None:
    """Load the extension, once; None or why it does not load."""
    if isinstance(error := load_extension(), str):
        return error
    for name in ("sum_of_squares", "update"):
        # Nothing to compute: tracing sees only that the declared arguments are mutated.
        torch.library.register_fake(f"fused_adamw::{name}", lambda *args: None)
    return None


@functools.cache
def build_info() -> dict[str, str]:
    """How the extension was built; nothing if it does not load.

    Returns:
        `cpu_capability`, `compiler`, and `cuda_version` ("13.0"), `cuda_archs` ("sm_90 compute_90") and
        `cuda_switches` (csrc/cuda/switches.h), which are empty without CUDA.
    """
    if _load_error():
        return {}
    info: dict[str, str] = json.loads(torch.ops.fused_adamw.build_info())
    return info


def _serves(capability: tuple[int, int], archs: str) -> bool:
    """Whether a GPU runs code for one of the architectures: of its major version, or older PTX."""
    wanted = capability[0] * 10 + capability[1]
    for arch in archs.split():
        kind, number = arch.split("_")
        built = int(number.rstrip("af"))
        if built == wanted:
            return True
        if number.endswith("a"):  # for this GPU and no other
            continue
        is_portable = kind == "compute" and not number.endswith("f")
        if built < wanted and (is_portable or built // 10 == wanted // 10):
            return True
    return False


def unavailable_reason(device: torch.device) -> str | None:
    """None if tensors on `device` can be served, else the reason."""
    if error := _load_error():
        return error
    if device.type == "cpu":
        return None
    if not is_gpu(device):
        return f"no kernels for {device.type} devices"
    archs = build_info()["cuda_archs"]
    if not archs:
        return "the extension was built without CUDA: no nvcc was found"
    if not has_gpu():
        return NO_GPU
    if refusal := refusal_of_runtime(build_info()["cuda_version"]):
        return refusal
    capability = capability_of(device)
    if not _serves(capability, archs):
        return f"the extension was built for {archs}, the GPU is sm_{capability[0]}{capability[1]}"
    return None


@functools.cache
def _has_kernel(device_type: str, formats: Formats) -> bool:
    if _load_error():
        return False
    built: bool = torch.ops.fused_adamw.supports(device_type, format_codes(formats))
    return built


def supports(device: torch.device, formats: Formats) -> bool:
    """Whether the build can step a parameter that is kept so, with its gradient and moments."""
    return _has_kernel(device.type, formats)


def chunk_size(device: torch.device, numel: int) -> int:
    """Elements per chunk that suit the kind of device and the number of elements in all.

    Never the model of a GPU: the last bits of the norm depend on it.
    """
    return _SMALL_CHUNK_SIZE if is_gpu(device) and numel < _SMALL_MODEL else _CHUNK_SIZE


def max_host_hypers(device: torch.device) -> int:
    """Up to how many hyper rows may stay in host memory."""
    return _MAX_INLINE_HYPERS if is_gpu(device) else 1 << 62


@functools.cache
def _operator(name: str) -> Callable[..., None]:
    operator: Callable[..., None] = getattr(torch.ops.fused_adamw, name).default
    return operator


def sum_of_squares(t: Tables, chunks: Tensor, out: Tensor) -> None:
    """Write the sum of squares of the gradients in these chunks of the tables to `out`, float64."""
    _operator("sum_of_squares")(t.rows, t.grads, chunks, t.chunk_size, t.formats[1], t.workspace, out)


def update(t: Tables, inputs: StepInputs) -> None:
    """Step in place the parameters, moments and step counts of all rows that have a gradient."""
    _operator("update")(
        t.rows, t.grads, t.chunks, t.chunk_size, t.hypers, t.formats, inputs.record, t.workspace, t.stats
    )
