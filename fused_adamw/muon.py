"""Muon for the hidden matrices and AdamW for the rest, as one optimizer.

Muon is torch's, or a class of yours. What is here joins the two: one norm, one clip, one decision to skip,
one state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .announce import announce
from .arguments import hint_for_string, number_of
from .backends import reference
from .backends.outcome import step_scalars
from .dtensors import local_grads, local_tensors
from .eager import EagerHooks, eager
from .groups import MuonSplit, compare_param_names
from .groups.muon import Convolutions, Implementation, split_parameters
from .groups.overrides import Overrides
from .optimizer import FusedHygieneAdamW
from .step.double_clip import DoubleClipDetector
from .step.norm import NormGroup, Reduction, Sums
from .tables import StepInputs

_NUMBERS = ("lr", "weight_decay", "momentum")  # of Muon's groups


def split_for_muon(
    model: nn.Module,
    *,
    convolutions: Convolutions = "adamw",
    for_: Implementation = "torch",
    weight_decay: float = 0.01,
    overrides: Overrides | None = None,
    example_inputs: Any = None,
) -> MuonSplit:
    """Split a model into hidden matrices for Muon and all other parameters for AdamW.

    By the roles of `build_param_groups`: to Muon go matrices, but not the first and the last map, routers,
    embeddings, positions, tokens, low-rank factors of adapters, state-space and depthwise convolutions,
    vectors, and what no rule recognises. Logs one line, `[Muon Groups] muon: 48 params, adamw: 100 params`.

    Args:
        model: Any module; wrappers change nothing.
        convolutions: `"adamw"`, or `"flatten"`: hidden ones go to Muon as matrices (out, in · kernel).
        for_: Whose Muon the groups are for: `"torch"` takes matrices alone, `"dion"` and `"keller"` stacks of
            them too, all but `"torch"` flatten convolutions. Groups get the keys that tell the parts apart in
            optimizers that take both: `algorithm` (dion), `use_fallback` (timm), `use_muon` (keller).
        weight_decay: Decay of what decays, in both parts.
        overrides: As for `build_param_groups`. The option `muon`, a bool, sends a parameter to Muon or not.
        example_inputs: As for `build_param_groups`: one forward pass shows the first and the last map, and
            routers.

    Returns:
        Groups for both parts, none empty, with hints and reasons by name. Every trainable parameter is in
        exactly one of them.

    Raises:
        TypeError: As `build_param_groups`.
        ValueError: As `build_param_groups`; or `for_` or `convolutions` is unknown; or an override sends to
            Muon what it cannot take.
    """
    split = split_parameters(
        model,
        convolutions=convolutions,
        for_=for_,
        weight_decay=weight_decay,
        overrides=overrides,
        example_inputs=example_inputs,
    )
    announce(f"[Muon Groups] {split}")
    return split


class MuonWithAdamW(EagerHooks):
    """Muon for one part of a model and `FusedHygieneAdamW` for the other: one optimizer.

    A step is that of both, after one clip of all gradients by their common norm. Schedulers see the groups of
    both; a GradScaler unscales, and skips, both; one `state_dict` holds both.

    AdamW's gradients are read, never rewritten. A Muon reads `p.grad`, so it is lent scaled copies where
    there is a clip or a loss scale: the gradients themselves stay as they are. Whether Muon skips a step is
    decided on the host: with `skip_nonfinite` or a GradScaler, a step waits for the device once.

    Args:
        split: What `split_for_muon` returns. Its groups are copied.
        lr: Learning rate of the Muon part.
        adamw_lr: Learning rate of the AdamW part; None: `lr`.
        muon: The class of the Muon part, called with groups, `lr=` and `muon_options`. None:
            `torch.optim.Muon`.
        muon_options: Further arguments of that class, such as `{"adjust_lr_fn": "match_rms_adamw"}`.
        max_grad_norm: Clip to this global norm over both parts; None: no clipping.
        skip_nonfinite: Skip steps whose global norm is not finite, in both parts.
        norm_process_group: As for `FusedHygieneAdamW`.
        adamw_options: Further arguments of `FusedHygieneAdamW`: `betas`, `eps`, `state_dtype`, ... Not `ema`,
            `guard` and `stats`, which would leave out the Muon part.

    Raises:
        ValueError: One part is empty, or a part refuses its arguments.
        TypeError: `split` is no `MuonSplit`, or a part refuses its arguments.
    """

    def __init__(
        self,
        split: MuonSplit,
        lr: float | Tensor = 1e-3,
        adamw_lr: float | Tensor | None = None,
        *,
        muon: Callable[..., torch.optim.Optimizer] | None = None,
        muon_options: Mapping[str, Any] | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        norm_process_group: dist.ProcessGroup | Callable[[Tensor], Tensor] | None = None,
        **adamw_options: Any,
    ) -> None:
        if not isinstance(split, MuonSplit):
            raise TypeError(f"expected what split_for_muon returns, got {type(split).__name__}")
        for part, groups in (("Muon", split.muon), ("AdamW", split.adamw)):
            if not groups:
                raise ValueError(f"no parameter goes to {part} ({split}): use the other optimizer alone")
        for name in ("ema", "guard", "stats"):
            if adamw_options.get(name):
                raise ValueError(
                    f"{name} is for FusedHygieneAdamW alone: here it would leave out the Muon part"
                )
        make_muon: Callable[..., torch.optim.Optimizer] = torch.optim.Muon if muon is None else muon
        self._norm_group = None if norm_process_group is None else NormGroup(norm_process_group)
        self._adamw = FusedHygieneAdamW(
            [dict(group) for group in split.adamw],
            lr if adamw_lr is None else adamw_lr,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            **adamw_options,
        )
        self._muon = make_muon([dict(group) for group in split.muon], lr=lr, **(muon_options or {}))
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """Make one state of all: parameters are in one part only."""
        self.state.update(self._muon.state)
        self.state.update(self._adamw.state)
        self._muon.state = self._adamw.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the AdamW part, or with `muon=True` among its options to the Muon part.

        Args:
            param_group: `params`, and the options that differ from those of its part.

        Raises:
            ValueError: As in the part that takes it, or a parameter is in another group.
        """
        if any(param_group is group for group in self._parts()):
            super().add_param_group(param_group)
            return
        group = dict(param_group)
        part = self._muon if group.pop("muon", False) else self._adamw
        part.add_param_group(group)
        try:
            super().add_param_group(part.param_groups[-1])
        except Exception:
            part.param_groups.pop()
            raise

    def _parts(self) -> list[dict[str, Any]]:
        return [*self._muon.param_groups, *self._adamw.param_groups]

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm over both parts that gradients are clipped to; None: no clipping."""
        return self._adamw.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._adamw.max_grad_norm = value

    @property
    def grad_norm(self) -> Any:
        """Gradient norm of both parts in the last step, as in `FusedHygieneAdamW`."""
        return self._adamw.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped so far, as in `FusedHygieneAdamW`."""
        return self._adamw.skipped_steps

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and the decision to skip to `step`."""
        return self._adamw._step_supports_amp_scaling

    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters of both parts that have a gradient: mutates them and their states.

        Gradients are as before afterwards. If an error is raised, nothing has changed, unless the Muon class
        raises it after it has changed something itself; torch's does so only where memory is short.

        Args:
            closure: Reevaluates the model and returns the loss; run first, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            TypeError: A hyper-parameter is not a number.
            RuntimeError: As in `FusedHygieneAdamW.step`; or a gradient of the Muon part is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_muon()
        adamw = self._adamw
        for name in ("grad_scale", "found_inf"):  # a GradScaler leaves them here
            if hasattr(self, name):
                setattr(adamw, name, getattr(self, name))
        try:
            adamw._double_clip = _BeforeUpdates(adamw._double_clip, self._step_muon)
            adamw.norm_process_group = self._sum_with_muon
            adamw.step()
        finally:
            adamw.norm_process_group = None
            adamw._double_clip = adamw._double_clip.detector  # type: ignore[attr-defined]
            for name in ("grad_scale", "found_inf"):
                vars(adamw).pop(name, None)
        return loss

    def _check_muon(self) -> None:
        """Refuse what a Muon would only find in the middle of a step."""
        for index, group in enumerate(self._muon.param_groups):
            for key in _NUMBERS:
                if key in group and number_of(group[key]) is None:
                    raise TypeError(
                        f"{key} of Muon's group {index} must be a number, got {group[key]!r}"
                        f"{hint_for_string(group[key])}"
                    )
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout is not torch.strided:
                    name = group.get("param_names", {i: f"number {i} of group {index}"})[i]
                    raise RuntimeError(f"gradient of {name} is sparse: Muon needs a dense one")

    def _sum_with_muon(self, sums: Tensor) -> Tensor:
        """Add what the Muon part has to `[sum of squares, found_inf]`, and then what other processes have."""
        if self._adamw._needs_norm():
            sums = torch.stack([sums[0] + self._sum_of_squares().to(sums), sums[1]])
        if self._norm_group is not None:
            sums = self._norm_group(sums, self._adamw.param_groups[0]["params"][0].device)
        return sums

    def _sum_of_squares(self) -> Tensor:
        """The sum of squares of the Muon part's gradients, of all shards of DTensors."""
        params = self._muon_params()
        grads = local_grads(params, [p.grad for p in params])
        if grads is None:
            raise RuntimeError("a gradient of the Muon part is not distributed as its parameter is")
        reduction = Reduction(params)
        sums = Sums(reduction)
        by_device: dict[torch.device, dict[int, list[Tensor]]] = {}
        for grad, group in zip(grads, reduction.sum_group_of, strict=True):
            if grad is not None:
                by_device.setdefault(grad.device, {}).setdefault(group, []).append(grad)
        if not by_device:  # none has a gradient; other processes may still expect a sum of this one
            by_device[params[0].device] = {}
        for device, groups in by_device.items():
            (places,) = sums.add(device, [list(groups)])
            for out, of_group in zip(places, groups.values(), strict=True):
                reference.sum_of_squares(of_group, out)
        totals, _ = sums.totals(True, None, None)
        return next(iter(totals.values())).sum()

    def _muon_params(self) -> list[Tensor]:
        return [p for group in self._muon.param_groups for p in group["params"]]

    def _step_muon(self, inputs: StepInputs) -> None:
        """Step the Muon part, when the norm is known and AdamW has changed nothing yet."""
        scalars = step_scalars(inputs)
        factor = scalars.grad_scale
        if scalars.skip is not None and bool(scalars.skip):
            return
        is_scaled = inputs.sums is not None and inputs.max_grad_norm != float("inf")
        is_scaled |= inputs.grad_scale is not None
        with self._lent_gradients(factor if is_scaled else None), self._restored_state():
            self._muon.step()

    @contextmanager
    def _lent_gradients(self, factor: Tensor | float | None) -> Iterator[None]:
        """Give Muon scaled copies of the gradients for a while; None: the gradients themselves."""
        params = self._muon_params()
        grads = [p.grad for p in params]
        try:
            if factor is not None:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = None if grad is None else _scaled(grad, factor)
            yield
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    @contextmanager
    def _restored_state(self) -> Iterator[None]:
        """Forget the entries that a Muon added to its state before it raised."""
        params = self._muon_params()
        before = {p: dict(self.state[p]) for p in params if p in self.state}
        try:
            yield
        except Exception:
            for p in params:
                self.state.pop(p, None)
            self.state.update(before)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this class, with the same groups; each part loads its own.

        Mutates the state and the options of both parts, or nothing.

        Args:
            state_dict: As returned by `state_dict`.

        Raises:
            ValueError: The groups do not match in number, in size, or in which parameters they hold.
            RuntimeError: A state is not that of its part.
        """
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = next((d for d in (pre(self, state_dict),) if d is not None), state_dict)
        saved = list(state_dict["param_groups"])
        self._check_groups(saved)
        before = self._muon.param_groups, self._adamw.param_groups
        is_muon = [any(group is g for g in self._muon.param_groups) for group in self.param_groups]
        try:
            for part, mine in ((self._adamw, False), (self._muon, True)):
                groups = [group for group, of_muon in zip(saved, is_muon, strict=True) if of_muon is mine]
                ids = {i for group in groups for i in group["params"]}
                of_part = {i: s for i, s in state_dict["state"].items() if i in ids}
                part.state = type(self.state)(dict)
                part.load_state_dict({"state": of_part, "param_groups": groups})
        except Exception:
            self._muon.param_groups, self._adamw.param_groups = before
            self._muon.state = self._adamw.state = self.state
            raise
        parts = {True: iter(self._muon.param_groups), False: iter(self._adamw.param_groups)}
        self.param_groups = [next(parts[of_muon]) for of_muon in is_muon]
        self.state = type(self.state)(dict)
        self._share_state()
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        sizes = [len(group["params"]) for group in saved]
        mine = [len(group["params"]) for group in self.param_groups]
        if sizes != mine:
            raise ValueError(
                f"the state_dict has groups of {sizes} parameters, the optimizer groups of {mine}: expected "
                "one of a MuonWithAdamW of the same model and split"
            )
        names = (
            [group.get("param_names") for group in saved],
            [g.get("param_names") for g in self.param_groups],
        )
        problem = compare_param_names(*names)
        if problem is not None:
            raise ValueError(problem)
        for group, own in zip(saved, self.param_groups, strict=True):
            if ("betas" in group) != ("betas" in own):
                raise ValueError("the state_dict steps a group by AdamW that is Muon's here, or the reverse")

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{key: vars(self)[key] for key in ("_muon", "_adamw", "_norm_group")},
        }


class _BeforeUpdates(DoubleClipDetector):
    """What happens when the norm is known and nothing has changed yet: a detector's look, and a call."""

    def __init__(self, detector: DoubleClipDetector, then: Callable[[StepInputs], None]) -> None:
        self.detector = detector
        self._then = then

    def observe(self, inputs: StepInputs) -> None:
        self.detector.observe(inputs)
        self._then(inputs)


def _scaled(grad: Tensor, factor: Tensor | float) -> Tensor:
    """A scaled copy of a gradient, in its dtype and placement."""
    copy = grad.clone()
    (local,) = local_tensors([copy])
    local.mul_(factor.to(local.device) if isinstance(factor, Tensor) else factor)
    return copy
