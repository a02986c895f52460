"""The guard against spikes: losses that it is told, skipped steps that it tells of, its history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from .backends.outcome import history_of, series_of
from .device import scalar_dtype
from .dtensors import full_tensor, has_peers
from .state.averages import Averaged
from .step.norm import NormGroup
from .step.plan import Plan
from .tables import HISTORY_WORDS, NO_SPIKES, STATUS_WORDS, SpikeOptions, status_words


class Guarded(Averaged):
    """The part of the optimizer that watches for spikes."""

    _plan: Plan | None
    _loss: Tensor | float | None = None  # of the next step

    @_disable_dynamo
    @torch.no_grad()
    def observe(self, loss: Tensor | float) -> None:
        """Put the loss of the next step under the same test as its gradient norm: it is not changed.

        A loss above its limit, and one that is not finite, skips the step, with `on="clip"` too. Where
        `torch.distributed` runs, this is a collective: the mean over all processes is tested, so that all
        decide alike.

        Args:
            loss: One element on any device, or a number.

        Raises:
            ValueError: The optimizer was built without `guard`, or `loss` has more than one element.
        """
        if self._guard is None:
            raise ValueError("the optimizer has no guard: build it with guard=SpikeGuard()")
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss must have one element, got a tensor of shape {tuple(loss.shape)}")
            loss = full_tensor(loss.detach())
            loss = loss.to(scalar_dtype(loss.device)).reshape(())
        if has_peers():
            mine, world = torch.as_tensor(loss, dtype=torch.float64), dist.group.WORLD
            assert world is not None
            loss = NormGroup(world)(mine, mine.device) / dist.get_world_size()
        self._loss = loss

    def _spike_options(self) -> SpikeOptions:
        return NO_SPIKES if self._guard is None else self._guard.options

    def _statuses(self) -> Iterator[Tensor]:
        """All tensors that hold the status: what one says, all say."""
        if self._plan is not None:
            yield from (launch.status for launch in self._plan.launches)
        elif self._status is not None:
            yield self._status

    def _check_streak(self) -> None:
        """Raise if too many steps in a row were skipped; the host waits for the device.

        Raises:
            RuntimeError: With the norms. The next streak is counted anew.
        """
        if self._guard is None or self._status is None:
            return
        history, series = history_of(self._status).cpu(), series_of(self._status, self._guard.window)
        streak, refused = int(history[0]), history[1:]
        if streak <= self._guard.max_consecutive:
            return
        for status in self._statuses():
            history_of(status)[0] = 0.0
        latest = [f"{refused[i % len(refused)]:.4g}" for i in range(max(0, streak - len(refused)), streak)]
        raise RuntimeError(
            f"SpikeGuard: {streak} steps in a row were skipped (max_consecutive="
            f"{self._guard.max_consecutive}). Their gradient norms were {', '.join(latest)}, the limit is "
            f"{float(series[0].limit):.4g}. If this is how the gradients are now, lower lr or go back to a "
            "checkpoint, or raise sigmas."
        )

    def guard_state_dict(self) -> dict[str, Any]:
        """The history of the guard, for what saves the rest of the state without it.

        `state_dict()` has it as "guard" at the top level, where torch's AdamW ignores it;
        `torch.distributed.checkpoint` drops it.

        Returns:
            `window`, an int, and `status`, a new float64 tensor.

        Raises:
            ValueError: The optimizer was built without `guard`.
        """
        if self._guard is None:
            raise ValueError("the optimizer has no guard: build it with guard=SpikeGuard()")
        window = self._guard.window
        if self._status is None:
            return {"window": window, "status": torch.zeros(status_words(window), dtype=torch.float64)}
        return {"window": window, "status": self._status.clone()}

    @torch.no_grad()
    def load_guard_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with a history of `guard_state_dict`: with its latest norms, if `window` is smaller now.

        Mutates the guard's history, and the count of skipped steps with it.

        Args:
            saved: What `guard_state_dict` returned; its tensor is copied.

        Raises:
            ValueError: The optimizer was built without `guard`, or this is no history.
        """
        self._set_status(self._read_history(saved))

    def _read_history(self, saved: Mapping[str, Any]) -> Tensor:
        """The status that goes on with a saved history, on the CPU."""
        if self._guard is None:
            raise ValueError("the optimizer has no guard: build it with guard=SpikeGuard()")
        window: Any = saved.get("window")
        status: Any = saved.get("status")
        is_history = isinstance(window, int) and isinstance(status, Tensor)
        if not is_history or status.shape != (status_words(window),):
            raise ValueError("guard: expected what guard_state_dict() returns, with window and status")
        status = status.detach().to("cpu", torch.float64)
        new = torch.zeros(status_words(self._guard.window), dtype=torch.float64)
        shared = STATUS_WORDS + HISTORY_WORDS
        new[:shared] = status[:shared]
        for old, series in zip(series_of(status, window), series_of(new, self._guard.window), strict=True):
            series.take(old, self._guard.options)
        return new

    def _set_status(self, status: Tensor) -> None:
        if self._plan is None:
            self._status = status
        for each in self._statuses():
            each.copy_(status)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with torch's keys: moments kept in 8 bits are float32 there.

        Loading them gives the same 8 bits again. Where bfloat16 parameters have masters, each state has a
        `master_residual` besides; where there is a guard, `guard` at the top level has its history.
        """
        saved = super().state_dict()
        if self._guard is not None:
            saved["guard"] = self.guard_state_dict()
        return saved

    def state_dict_compact(self) -> dict[str, Any]:
        """A `state_dict` with moments as they are kept, in 8 bits too: a quarter of the size.

        `load_state_dict` of this class takes it; torch's AdamW does not. Each state that is kept in 8 bits
        has `exp_avg_code` (int8), `exp_avg_sq_code` (uint8), and for both a `_scale` (float32).
        """
        saved = super().state_dict_compact()
        if self._guard is not None:
            saved["guard"] = self.guard_state_dict()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this class or of `torch.optim.AdamW`/`Adam`, whose groups must be the same.

        Moments take the parameter's layout, and `state_dtype` where it is set. Options that a saved group
        lacks stay as they are, all others replace the optimizer's, as in torch; a warning says where
        parameters begin or cease to decay by that. A guard goes on with the history that is saved. Nothing is
        shared with `state_dict` afterwards, and nothing changes if an error is raised.

        To load a file of torch.distributed.checkpoint that was saved without `param_names` into an optimizer
        that has them, give `dcp.load` a `DefaultLoadPlanner(allow_partial_load=True)`.

        Args:
            state_dict: As returned by `state_dict`.

        Raises:
            ValueError: The groups do not match the optimizer's: in number, in size, or, where both have
                `param_names`, in which parameters they hold; a moment is a DTensor where the parameter is
                not, or the other way round, or is on another mesh; or `guard` is no history.
            RuntimeError: A saved state is not AdamW's, a moment is not of its parameter's shape, a group is
                `differentiable`, or torch's `load_state_dict` has cast what it should have kept.
        """
        has_history = self._guard is not None and "guard" in state_dict
        status = self._read_history(state_dict["guard"]) if has_history else None
        super().load_state_dict(state_dict)
        if status is not None:
            self._set_status(status)
