"""torch's own operators on tensors of the pretend GPU, computed on the CPU over the same memory."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor, empty, empty_strided  # tests put others in their place in torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_map

from . import device as gpu

# These only handle memory: torch's CUDA code does them, through the pretend runtime.
_REAL = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_"),
        *("_pin_memory", "is_pinned", "record_stream", "lift_fresh", "detach", "detach_"),
    )
)
_COPIES = ("aten::copy_", "aten::_to_copy")


def memory_of(t: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor of the pretend GPU."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0 or t.numel() == 0:
        return empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    view = empty(0, dtype=t.dtype).set_(
        torch.frombuffer(memory, dtype=torch.uint8).untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )
    if t.is_neg():
        view = torch._neg_view(view)
    return view.conj() if t.is_conj() else view


def _on_gpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


class Operators(TorchDispatchMode):
    """Sends every operator where it can run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch calls it."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # it has no memory: its class takes it apart first
        kwargs = kwargs or {}
        name = func._schema.name
        devices: list[torch.device] = []
        tree_map(lambda x: devices.append(x.device) if _on_gpu(x) else None, (args, kwargs))
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not devices and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if name in _REAL or name.startswith("fused_adamw::"):
            return func(*args, **kwargs)
        if _is_composed(func):  # in inference mode, operators arrive here that are made of others
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view or "view" in name:
            return func(*args, **kwargs)
        if name in _COPIES and (moved := self._copy(name, func, args, kwargs)) is not None:
            return moved
        target = target or devices[0]
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        return _compute(name, func, args, kwargs, target)

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Copy by torch's CUDA code what need not be converted on the GPU; None if it has to be."""
        source = args[1] if name == "aten::copy_" else args[0]
        like = args[0] if name == "aten::copy_" else None
        dtype = like.dtype if like is not None else kwargs.get("dtype") or source.dtype
        device = like.device if like is not None else torch.device(kwargs.get("device") or source.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device != source.device and not (_is_plain(source) and source.dtype == dtype):
            with self:  # as torch does: converted where it is, then copied
                source = source.resolve_conj().resolve_neg().to(dtype).contiguous()
        if source.dtype != dtype or not _is_plain(source):
            return None
        if like is not None:
            if not like.is_contiguous() or like.shape != source.shape:
                return None
            return func(like, source, *args[2:], **kwargs)
        if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
            return None
        return func(source, *args[1:], **kwargs)


def _is_plain(t: Tensor) -> bool:
    return t.is_contiguous() and not t.is_conj() and not t.is_neg()


def _is_composed(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _compute(name: str, func: Any, args: Any, kwargs: Any, target: torch.device) -> Any:
    """Run an operator on the CPU, over the memory of its arguments."""
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        gpu.run_everything()
        gpu.note(f"operator {name}")
    given: dict[int, Tensor] = {}  # by the view of its memory

    def view(x: Any) -> Any:
        if not _on_gpu(x):
            return x
        memory = memory_of(x)
        given[id(memory)] = x
        return memory

    cpu_args, cpu_kwargs = tree_map(view, (args, kwargs))
    cpu_kwargs = {key: value for key, value in cpu_kwargs.items() if key != "pin_memory"}
    if cpu_kwargs.get("device") is not None:
        cpu_kwargs["device"] = torch.device("cpu")
    if isinstance(cpu_kwargs.get("generator"), torch.Generator):
        cpu_kwargs["generator"] = None
    if capturing:
        return _capture(name, func, cpu_args, cpu_kwargs, given, target)
    return _to_gpu(name, func(*cpu_args, **cpu_kwargs), given, target)


def _to_gpu(name: str, out: Any, given: dict[int, Tensor], target: torch.device) -> Any:
    """What an operator returned, on the GPU: an argument that it returned is the one that was given."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            gpu.note(f"synchronize {name}")  # a value that the host reads
            return x
        if id(x) in given:
            return given[id(x)]
        if target.type != "cuda" or x.device.type != "cpu":
            return x
        result = empty_strided(x.shape, x.stride(), dtype=x.dtype, device=target)
        gpu.run_everything()
        memory_of(result).copy_(x)
        return result

    return tree_map(moved, out) if out is not None else None


def _capture(
    name: str, func: Any, args: Any, kwargs: Any, given: dict[int, Tensor], target: torch.device
) -> Any:
    """Have a graph run an operator at each replay. Now it runs on copies, for the shapes of its results."""
    copies: dict[int, Tensor] = {}

    def copied(x: Any) -> Any:
        if id(x) not in given:
            return x
        copy = x.clone()
        copies[id(copy)] = given[id(x)]
        return copy

    out = func(*tree_map(copied, args), **tree_map(copied, kwargs))
    results: list[Tensor | None] = []

    def allocated(x: Any) -> Any:
        if not isinstance(x, Tensor):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} reads a value")
        if id(x) in copies:
            results.append(None)
            return copies[id(x)]
        result = empty_strided(x.shape, x.stride(), dtype=x.dtype, device=target)
        results.append(memory_of(result))
        return result

    returned = tree_map(allocated, out) if out is not None else None

    def work() -> None:
        values: list[Tensor] = []
        tree_map(values.append, func(*args, **kwargs))
        for value, memory in zip(values, results, strict=True):
            if memory is not None:
                memory.copy_(value)

    gpu.enqueue(torch.cuda.current_stream().cuda_stream, f"operator {name}", work)
    return returned


def install() -> None:
    """Make every thread of this process compute under the mode, and tensors print."""
    from torch import _tensor_str

    torch.utils.deterministic.fill_uninitialized_memory = False  # the pretend GPU fills it anyway
    Operators().__enter__()
    run = threading.Thread.run

    def run_under_mode(thread: threading.Thread) -> None:
        with Operators():
            run(thread)

    threading.Thread.run = run_under_mode  # type: ignore[method-assign]
    text_of = _tensor_str._str

    def text_of_any(self: Tensor, *, tensor_contents: str | None = None) -> str:
        # Tensors print with all modes off.
        shown = self
        if _on_gpu(self):
            gpu.run_everything()
            shown = memory_of(self.detach()).clone()
        return text_of(shown, tensor_contents=tensor_contents)

    _tensor_str._str = text_of_any
    torch.cuda._lazy_call(gpu.watch_blocks)  # torch's allocator has to be there
