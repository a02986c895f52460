"""How the optimizer steps: checks, hyper-parameters, a plan, its run. The arithmetic is in the backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .announce import logger
from .backends import kernels_for, reference
from .device import has_graphs, is_capturing
from .dtensors import has_peers, is_flattened, local_grads
from .eager import EagerHooks, eager
from .fields import Rounding, State
from .names import show_names_to_dcp
from .observations import Observed
from .state.checks import check_fused, check_hypers, check_no_transform, check_not_differentiable, check_step
from .state.contents import is_counted, missing_state
from .step.double_clip import DoubleClipDetector
from .step.guard import Found
from .step.members import Tensors
from .step.plan import Plan
from .step.request import Request
from .step.snapshot import Snapshot
from .tables import NO_AVERAGING, Hyper, StepInputs


class Stepping(EagerHooks, Observed):
    """The part of the optimizer that steps."""

    _captured_plans: list[Plan]  # replaced since, but graphs still read their tables
    _double_clip: DoubleClipDetector

    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient: mutates them, their moments and step counts.

        Gradients are not changed. Nothing is changed if an error is raised, unless memory runs out while the
        reference steps one parameter after the other: those before are stepped.

        Args:
            closure: Reevaluates the model and returns the loss; run first, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            TypeError: A hyper-parameter of a group was set to something that is not a number.
            RuntimeError: A gradient or its parameter is sparse; `fused` is set for a device or dtype that has
                no fused kernel in torch; a gradient or a moment is not on its parameter's device or mesh, or
                has another shape; a state lacks a moment or its step count; a group is
                `differentiable`; FSDP1 hides the norm that is asked for; the step is inside a transform of
                `torch.func`.
        """
        self._check_graph_capture()
        self._check_not_swapped("step()")
        check_no_transform()
        check_not_differentiable(self.param_groups)
        show_names_to_dcp()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        hypers = self._hypers()
        plan, found, state = self._current_plan()
        self._check_norm_is_known(plan.flattened)
        request = Request(
            self._max_grad_norm,
            self._skip_nonfinite,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._norm_group,
            self._precision.seed,
            self._loss,
            self._spike_options(),
            NO_AVERAGING if self._ema is None else self._ema.averaging,
            self._stats,
        )

        def before_updates(inputs: StepInputs) -> Callable[[], None]:
            self._double_clip.observe(inputs)
            return _nothing if plan is self._plan else self._adopt(plan, state)

        tensors = Tensors(self.param_groups, state, found.grads or ())
        plan.run(tensors, found, hypers, request, before_updates)
        self._has_norm, self._loss = request.needs_norm, None
        return loss

    def _check_graph_capture(self) -> None:
        # torch's own check, which it has renamed: raises if a capture runs without capturable=True.
        if not has_graphs():
            return
        current, before = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
        getattr(self, current if hasattr(self, current) else before)()

    def _check_norm_is_known(self, flattened: Sequence[int]) -> None:
        """Raise if a norm is asked for that cannot be known from parameters of which FSDP1 flattened some."""
        if flattened and self._needs_norm() and self._norm_group is None and has_peers():
            name = self._names()[flattened[0]]
            raise RuntimeError(
                f"parameter {name} is sharded by FSDP1 (FullyShardedDataParallel), and a "
                "gradient norm over the shards of one process is wrong. Pass norm_process_group=, the group "
                "over which FSDP shards; with NO_SHARD a callable that returns what it is given; or clip by "
                "FullyShardedDataParallel.clip_grad_norm_, without max_grad_norm and skip_nonfinite."
            )

    def _hypers(self) -> list[Hyper]:
        """Read the hyper-parameters of all groups, as schedulers left them."""
        try:
            hypers = [Hyper.of(group) for group in self.param_groups]
            return self._variants.applied(hypers, self.param_groups)
        except (TypeError, ValueError):
            for index, group in enumerate(self.param_groups):
                check_hypers(group, index)  # names what is wrong
            raise

    def _current_plan(self) -> tuple[Plan, Found, State]:
        """Return the plan (a new one if the old one is out of date), the gradients, the state it is for."""
        plan = self._plan
        if plan is not None and (seen := plan.check(self.param_groups, self.state)) is not None:
            return plan, seen, self.state
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        local, state = local_grads(params, grads), cast(State, self.state)
        is_current = (
            plan is not None
            and local is not None
            and plan.is_current(self.param_groups, Snapshot(params, local, state))
        )
        if not is_current:
            self._check_inputs(params, grads)
            plan, local, state = self._new_plan(params, grads, local)
        assert plan is not None
        assert local is not None
        return plan, Found.of(params, local), state

    def _check_inputs(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Refuse what no plan could be made of, in the mode that the step is called in."""
        for index, group in enumerate(self.param_groups):
            self._check_amsgrad(group, index)
        fused = [group["fused"] for group in self.param_groups for _ in group["params"]]
        snapshot = Snapshot(params, grads, self.state)
        checked: set[object] = set()
        names: list[str] = []
        for slot, (p, grad, is_fused) in enumerate(zip(params, grads, fused, strict=True)):
            state = self.state.get(p, {})
            kind = snapshot.kind(slot, state)
            if kind is not None:  # else it differs from all others
                if (is_fused, kind) in checked:
                    continue
                checked.add((is_fused, kind))
            names = names or self._names()
            name = names[slot]
            if is_fused and grad is not None and not state:
                check_fused(p, name)
            check_step(state, p, grad, name)

    @torch.inference_mode(False)  # tensors made in inference mode could not be updated outside of it
    @torch.no_grad()
    def _new_plan(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], local: list[Tensor | None] | None
    ) -> tuple[Plan, list[Tensor | None], dict[Any, Any]]:
        """Make the state that is missing, and lay out the tables; `_adopt` makes both the optimizer's.

        Args:
            params: All parameters.
            grads: Their gradients.
            local: `local_grads` of them, if called already: it may be a collective, which processes that keep
                their plan do not enter again.

        Returns:
            The plan, `local_grads`, and the state as it then is.
        """
        if any(is_capturing(device) for device in {p.device for p in params}):
            raise RuntimeError(
                "FusedHygieneAdamW cannot allocate its state and tables while a CUDA graph is captured: run "
                "a step without capture first, with gradients of the same layouts"
            )
        flattened = [slot for slot, p in enumerate(params) if is_flattened(p)]
        self._check_norm_is_known(flattened)
        local = local_grads(params, grads) if local is None else local
        assert local is not None  # every gradient was found to fit
        state = dict(self.state)
        amsgrad = [group["amsgrad"] for group in self.param_groups for _ in group["params"]]
        for p, grad, has_maximum, kept in zip(params, grads, amsgrad, self._kept(), strict=True):
            if grad is not None or is_counted(state, p):
                of_p = state.get(p, {})
                state[p] = {
                    **of_p,
                    **missing_state(of_p, p, has_maximum, kept, self._average_format(p)),
                }
        plan = Plan(
            self.param_groups,
            local,
            state,
            lambda device: kernels_for(self._backend, device),
            reference,
            Rounding(self._precision.rounds_params, self._precision.rounds_moments),
            self._ema is not None,
            self._spike_options().window,
            self._status,
            self._plan,
        )
        names = self._names() if plan.fallbacks or plan.copies.layouts else []
        for slot, reason in plan.fallbacks.items():
            logger.debug("parameter %s is stepped by the reference: %s", names[slot], reason)
        for slot in plan.copies.layouts:
            logger.debug("the gradient of parameter %s is copied: it is laid out otherwise", names[slot])
        return plan, local, state

    def _adopt(self, plan: Plan, state: Mapping[Any, Any]) -> Callable[[], None]:
        """Make a new plan, and the state that it was made for, those of the optimizer.

        Returns:
            What undoes it. If an error is raised, that has been done.
        """
        old, old_status, n_captured = self._plan, self._status, len(self._captured_plans)
        made = {p: of_p for p, of_p in state.items() if of_p is not self.state.get(p)}
        new_params = [p for p in made if p not in self.state]
        pairs = [(self.state[p], of_p) for p, of_p in made.items() if p in self.state]
        new_names = [(mine, [n for n in of_p if n not in mine]) for mine, of_p in pairs]

        def undo() -> None:
            self._plan, self._status = old, old_status
            del self._captured_plans[n_captured:]
            for p in new_params:
                self.state.pop(p, None)
            for mine, names in new_names:
                for name in names:
                    mine.pop(name, None)

        try:
            for p in new_params:
                self.state[p] = made[p]
            for mine, of_p in pairs:
                mine.update(of_p)
            if old is not None and old.was_captured:
                self._captured_plans.append(old)
            self._plan, self._status = plan, plan.status
        except BaseException:
            undo()
            raise
        return undo


def _nothing() -> None:
    """Undoes nothing."""
