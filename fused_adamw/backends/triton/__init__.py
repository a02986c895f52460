"""The Triton backend: the kernels' launches and limits.

Serves CUDA devices where no nvcc was at hand, and CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from ...device import NO_GPU, has_gpu, is_capturing, is_gpu, multiprocessors_of, on_gpu
from ...formats import Formats
from ...tables import StepInputs, Tables, format_codes
from . import formats as kept
from .kernels import norm_kernel, update_kernel

# Elements per chunk: as many per thread as in torch's multi-tensor kernels. Long enough to hide the walk
# through the tables, short enough that the last round of chunks is a small part of a step.
CHUNK_SIZE = 1 << 14
# From this many elements on there are rounds enough for longer chunks, of which the norm has fewer to add up.
_LARGE_MODEL = 1 << 28
_LARGE_CHUNK_SIZE = 1 << 16

_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# A persistent grid, all of which an SM of 65,536 registers holds at once. Noise, and codes that wait for the
# maximum of their block, take more registers; so do stats and averages, and both take more than either.
_REGISTERS, _SPECIAL_REGISTERS, _MOST_REGISTERS = 72, 160, 224
_PROGRAMS_PER_SM = 65536 // (_REGISTERS * _THREADS)
_INTERPRETED_PROGRAMS = 3  # enough to walk with a stride and to have a last one

_INTERPRETED = not isinstance(update_kernel, triton.JITFunction)
# No contraction, as the C++ and CUDA kernels are built, for the same numbers.
_OPTIONS = {"num_warps": _NUM_WARPS, "enable_fp_fusion": False}


def _block(*formats: Any, is_special: bool = False) -> int:
    """Elements that a program's threads access at once, 16 bytes of the widest type each.

    With more, the compiler passes values between threads before it stores that type.
    """
    bits: int = max(kept.values_of(format).primitive_bitwidth for format in formats)
    if is_special:
        bits = max(bits, 32)  # four elements: what is special takes the registers of the others
    return 16 * 8 * _THREADS // bits


def _registers(formats: kept.Formats, stats: torch.Tensor) -> int:
    """Of a thread of an update."""
    has_special_formats = not all(map(kept.is_plain, formats[:4]))
    has_besides = len(stats) > 0 or formats.average is not None
    return (_REGISTERS, _SPECIAL_REGISTERS, _MOST_REGISTERS)[has_special_formats + has_besides]


@functools.cache
def _multiprocessors(device: int) -> int:
    return multiprocessors_of(device)


_launched: set[tuple[object, ...]] = set()


def _check_compiled(kernel: Any, device: torch.device, arguments: dict[str, Any]) -> None:
    """Refuse to compile during a capture: CUDA forbids it to load code then."""
    constants = [value if name.isupper() else value is None for name, value in arguments.items()]
    binary = (kernel, device.index, *constants)
    if binary in _launched:
        return
    if is_capturing(device):
        raise RuntimeError(
            "Triton compiles a kernel when it is first launched, which is impossible while a CUDA graph is "
            "captured: run a step without capture first, with max_grad_norm, skip_nonfinite, guard, stats, "
            "grad_scale and found_inf set where they are set now"
        )
    _launched.add(binary)


def _launch(kernel: Any, t: Tables, chunks: torch.Tensor, registers: int, **arguments: object) -> None:
    """Run a kernel over these chunks of the tables, in so many registers of a thread."""
    n_chunks = chunks.shape[0]
    given = {
        "rows": t.rows,
        "grads": t.grads,
        "chunks": chunks,
        "n_chunks": n_chunks,
        "chunk_size": t.chunk_size,
        "workspace": t.workspace,
        **arguments,
    }
    _check_compiled(kernel, t.rows.device, given)
    if _INTERPRETED:
        kernel[(max(1, min(n_chunks, _INTERPRETED_PROGRAMS)),)](**given)
        return
    device = t.rows.get_device()
    grid = (max(1, min(n_chunks, 65536 // (registers * _THREADS) * _multiprocessors(device))),)
    with on_gpu(device):  # Triton launches on the current device, on its current stream
        kernel[grid](**given, **_OPTIONS, maxnreg=registers)


def unavailable_reason(device: torch.device) -> str | None:
    """None if tensors on `device` can be served, else the reason."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is installed, 3.6 or later is needed"
    if device.type == "cpu":
        return None if _INTERPRETED else "CPU tensors need TRITON_INTERPRET=1 set before Triton is imported"
    if not is_gpu(device):
        return f"no kernels for {device.type} devices"
    if _INTERPRETED:
        return "TRITON_INTERPRET=1 is set, and the interpreter cannot read the memory of a GPU"
    if not has_gpu():
        return NO_GPU
    return None


def supports(device: torch.device, formats: Formats) -> bool:
    """Whether a kernel can be compiled for a parameter that is kept so, with its gradient and moments."""
    return kept.Formats.of(format_codes(formats)).fit_together()


def chunk_size(device: torch.device, numel: int = 0) -> int:
    """Elements per chunk that suit the number of elements in all. The norm's last bits depend on it."""
    return CHUNK_SIZE if numel < _LARGE_MODEL else _LARGE_CHUNK_SIZE


def max_host_hypers(device: torch.device) -> int:
    """Up to how many hyper rows may stay in host memory.

    None for a GPU: Triton has no kernel parameter that could be indexed. A new lr is uploaded, in one copy.
    """
    return 0 if is_gpu(device) else 1 << 62


def sum_of_squares(t: Tables, chunks: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of squares of the gradients in these chunks of the tables to `out`.

    One launch, deterministic, no sync. Mutates the workspace.
    """
    grad = kept.Formats.of(t.formats).grad
    _launch(norm_kernel, t, chunks, _REGISTERS, sum=out, F=grad, BLOCK=2 * _block(grad))


def update(t: Tables, inputs: StepInputs) -> None:
    """Step in place the parameters, moments and step counts of all rows with a gradient. One launch."""
    formats = kept.Formats.of(t.formats)
    registers = _registers(formats, t.stats)
    spikes, averaging = inputs.spikes, inputs.averaging
    _launch(
        update_kernel,
        t,
        t.chunks,
        registers,
        n_rows=t.rows.shape[0],
        hypers=t.hypers,
        sums=inputs.sums,
        n_sums=0 if inputs.sums is None else inputs.sums.numel(),
        max_grad_norm=inputs.max_grad_norm,
        grad_scale=inputs.grad_scale,
        found_inf=inputs.found_inf,
        seed=inputs.seed,
        status=inputs.status,
        loss=inputs.loss,
        spike_sigmas=spikes.sigmas,
        spike_window=spikes.window,
        spike_warmup=spikes.warmup,
        average_decay=averaging.decay,
        average_warmup=averaging.warmup,
        average_start=averaging.start_step,
        average_every=averaging.every,
        stats=t.stats if len(t.stats) else None,
        SKIP_NONFINITE=inputs.skip_nonfinite,
        SPIKES=spikes.window > 0,
        CLIPS=spikes.clips,
        F=formats,
        BLOCK=_block(*formats.present, is_special=registers != _REGISTERS),
    )
