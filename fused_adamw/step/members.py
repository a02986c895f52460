"""Members of a plan: the parameters that it steps, and what follows from how their tensors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtensors import local_tensors, start_in_whole
from ..fields import MAXIMUM, SCALES, Keys, Rounding, State, formats_of, keys_of
from ..formats import Field, Format, Formats, Window, has_dense_rows, plain_format, window_of
from ..layout import is_plain, same_layout
from ..tables import FORMAT_CODE, Entry
from .protocols import KernelBackend
from .snapshot import Form


class Tensors(NamedTuple):
    """What an optimizer holds when it steps.

    Attributes:
        groups: Its `param_groups`.
        state: Its state.
        grads: The gradients of all parameters, of DTensors the local ones.
    """

    groups: Sequence[Mapping[str, Any]]
    state: State
    grads: Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter of a plan, and how to find its tensors. It keeps none of them alive."""

    slot: int  # position among all parameters of all groups
    group: int
    index: int  # position in the group
    id: int
    sum_group: int  # gradients of one sum group are summed together
    kind: Kind
    # Where a snapshot has the parameter, and its state: a position to add to that of each key.
    place: int
    place_of_state: int
    places_in_state: Mapping[str, int]

    def entry(self, tensors: Tensors) -> Entry:
        """Look up the parameter and its state, as they are now."""
        p = tensors.groups[self.group]["params"][self.index]
        state = tensors.state[p]

        keys_of, formats = self.kind.keys, self.kind.formats

        def field(name: str, format: Format) -> Field:
            keys = keys_of[name]
            values = state[keys.values] if keys.values else p
            return Field(format, *local_tensors((values, state[keys.side] if keys.side else None)))

        (step,) = local_tensors((state["step"],))
        return Entry(
            self.slot,
            self.group,
            self.kind.window,
            field("param", formats.param),
            field("exp_avg", formats.exp_avg),
            field("exp_avg_sq", formats.exp_avg_sq),
            field(MAXIMUM, plain_format(state[MAXIMUM].dtype)) if MAXIMUM in keys_of else None,
            step.view(()) if step.dim() else step,  # others may count with it
            None if formats.average is None else field("average", formats.average),
        )

    def place_of(self, key: str) -> int:
        """Where a snapshot has a tensor: of the state under a key, or "" for the parameter."""
        return self.place_of_state + self.places_in_state[key] if key else self.place


class Kind(NamedTuple):
    """What follows from the forms of a parameter's tensors, and is worked out once for all that are alike.

    Attributes:
        keys: Under which its state has each field.
        formats: How it is kept.
        in_rows: The same as kernels see it, to whom complex numbers are pairs; None: they cannot step it.
        numel: The number of values that kernels see.
        window: Where its elements lie in the whole parameter.
        grad_copy: What a copy of its gradient looks like that kernels can read; None: they read the gradient.
        fallback: Why kernels that serve its device cannot step it.
    """

    keys: Mapping[str, Keys]
    formats: Formats
    in_rows: Formats | None
    numel: int
    window: Window
    grad_copy: Form | None
    fallback: str | None

    @classmethod
    def of(cls, forms: Mapping[str, Form], rounding: Rounding, backend: KernelBackend | None) -> Kind | None:
        """Work it out.

        Args:
            forms: Of the parameter, its gradient, and what a step reads of its state, each under its name.
            rounding: What is rounded stochastically.
            backend: The kernels that serve its device.

        Returns:
            None if its elements are too irregular a part of the whole to be numbered, and have to be.
        """
        dtypes, p = {name: form.dtype for name, form in forms.items()}, forms["parameter"]
        formats = formats_of(dtypes, rounding)
        in_rows = formats_of({name: dtype.to_real() for name, dtype in dtypes.items()}, rounding)
        window = window_in_whole(p, formats)
        grad_copy = None if backend is None else copy_of(forms["gradient"], p)
        if grad_copy is not None:
            forms = {**forms, "gradient": grad_copy}
        reason = None if backend is None else fallback_reason(forms, in_rows, backend)
        if window is None:
            return None
        if backend is not None and window.whole_columns >= 2**32:  # a row of the table has 32 bits for it
            reason = f"its rows have {window.whole_columns:,} values"
        has_kernel = backend is not None and reason is None
        numel = p.numel * (2 if p.dtype.is_complex else 1)
        if not has_kernel:
            return cls(keys_of(forms), formats, None, numel, window, None, reason)
        return cls(keys_of(forms), formats, in_rows, numel, window, grad_copy, None)


def window_in_whole(p: Form, formats: Formats) -> Window | None:
    """Where the elements of a parameter, or of this process's part of it, lie in the whole parameter.

    None: they are not regular enough to be numbered.
    """
    if not any(format.stochastic for format in formats.present.values()):  # nothing depends on it
        return Window(0, 1, 1)
    t, spec = _like(p.shape, p.stride), p.key[-1]
    has_scales = formats.exp_avg.side_dtype is not None or formats.exp_avg_sq.side_dtype is not None
    by_rows = has_scales and has_dense_rows(t)
    if spec is None:
        return window_of(t, t, [0] * t.dim(), by_rows=by_rows)
    start = start_in_whole(spec)
    whole = _like(spec.shape, spec.stride)
    return None if start is None else window_of(t, whole, start, by_rows=by_rows)


def _like(shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), device="meta")


def copy_of(grad: Form, p: Form) -> Form | None:
    """What a copy of a gradient looks like that is laid out as its parameter is.

    None if there is no need for one, or if it is no copy that kernels could read.
    """
    is_readable = grad.is_dense and same_layout(p.shape, grad.stride, p.stride)
    if is_readable or not grad.is_copyable or not p.is_dense or grad.shape != p.shape:
        return None
    return p.of_grad(grad.dtype)


def fallback_reason(forms: Mapping[str, Form], formats: Formats, backend: KernelBackend) -> str | None:
    """None if kernels can step a parameter by address and flat index, else the reason.

    Args:
        forms: Of the parameter, its gradient, and what a step reads of its state, each under its name.
        formats: How kernels see them.
        backend: The kernels.
    """
    for name, form in forms.items():
        if not is_plain(form.type):
            return f"{name} is a {form.type.__name__}"
        if not form.is_plain:
            return f"{name} is not plain strided memory"
    if forms["step"].dtype is not torch.float32:
        return f"step is counted in {forms['step'].dtype}"
    p = forms["parameter"]
    for name, form in forms.items():
        if name == "step":
            continue
        if not form.is_dense:
            return f"{name} is not dense: strides {form.stride} for shape {tuple(form.shape)}"
        if name in SCALES:
            if not _like(form.shape, form.stride).is_contiguous():
                return f"{name} is not contiguous: strides {form.stride} for shape {tuple(form.shape)}"
            if not has_dense_rows(_like(p.shape, p.stride)):
                return f"the parameter has strides {p.stride}, and no rows to be cut into blocks"
        elif form.shape != p.shape or not same_layout(p.shape, form.stride, p.stride):
            return f"{name} has strides {form.stride}, the parameter {p.stride}"
    is_known = all(format.name in FORMAT_CODE for format in formats.present.values())
    maximum = forms.get(MAXIMUM)
    if maximum is not None and plain_format(maximum.dtype.to_real()) != formats.exp_avg:
        is_known = False
    if not is_known or not backend.supports(p.device, formats):
        return "no kernel for " + ", ".join(
            f"{name} of {form.dtype}" for name, form in forms.items() if name != "step"
        )
    return None
