"""Averages of the weights: how to evaluate with them, and how to get them as a model's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..dtensors import is_fsdp2, local_tensors
from ..fields import AVERAGE
from .masters import Mastered


class _Exchange:
    """One parameter that trades places with its average, and back, whenever it is interrupted."""

    def __init__(self, p: Tensor, average: Tensor) -> None:
        self._p, self._average = p, average
        self._keeps_parameter = p.dtype == average.dtype  # the average's memory can hold it meanwhile
        self._held: Tensor | None = p.clone()

    def go(self) -> None:
        """Put the average into the parameter."""
        assert self._held is not None
        self._p.copy_(self._average)
        if self._keeps_parameter:
            self._average.copy_(self._held)
            self._held = None

    def back(self) -> None:
        """Undo it, however far it got."""
        if self._held is None:
            self._held = self._average.clone()
        if self._keeps_parameter and _same_bits(self._average, self._held):
            self._average.copy_(self._p)
        self._p.copy_(self._held)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (x, y)))


class Averaged(Mastered):
    """The part of the optimizer that gives averages away."""

    _is_swapped: bool = False

    @contextmanager
    def swap_ema(self, model: nn.Module | None = None) -> Iterator[None]:
        """Evaluate with the averages: exchanges parameters and averages for the time of a `with` block.

        Parameters are as they were afterwards, bit for bit, whatever is raised inside, also in the optimizer
        itself. Of DTensors the local shards are exchanged. Where an average has another dtype than its
        parameter, a copy of the parameter is held meanwhile. Parameters that have had no gradient stay as
        they are.

        Args:
            model: Its FSDP2 modules, which hold on to whole parameters after a forward pass, let go of them
                before and after. None: the model that the optimizer was built from.

        Raises:
            ValueError: The optimizer was built without `ema`.
            RuntimeError: Inside of another `swap_ema`. Inside, `step`, `state_dict`, `load_state_dict` and
                whatever else takes parameters for what they are, such as `copy.deepcopy`, raise it too.
        """
        self._check_ema()
        self._check_not_swapped("swap_ema()")
        if model is None and self._model is not None:
            model = self._model()
        done: list[_Exchange] = []
        try:
            self._is_swapped = True
            _reshard(model)
            with torch.no_grad():
                for p, average in self._local_averages():
                    done.append(_Exchange(p, average))
                    done[-1].go()
            yield
        finally:
            try:
                _undo(done)
            finally:
                self._is_swapped = False
                _reshard(model)

    @_disable_dynamo
    @torch.no_grad()
    def ema_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The `state_dict` of a model with the averages in the place of its weights.

        Args:
            model: The model that the optimizer's parameters belong to.

        Returns:
            `model.state_dict()` with the optimizer's own averages, in the dtype that they are kept in and as
            DTensors where parameters are: copy them to keep them as they are. Tied weights are one tensor
            under all of their names. Buffers, and parameters that have no average yet, are the model's own.

        Raises:
            ValueError: The optimizer was built without `ema`; or a parameter that has an average is not among
                the values of `model.state_dict()`.
            RuntimeError: Inside of `swap_ema`, where the model itself has them.
        """
        self._check_ema()
        self._check_not_swapped("ema_state_dict()")
        averages = {id(p): self.state[p][AVERAGE] for p in self._with(AVERAGE)}
        return self._weights_of(model, set(averages), lambda p: averages.get(id(p), p).detach())

    def _local_averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        for p in self._with(AVERAGE):
            local, average = local_tensors((p.detach(), self.state[p][AVERAGE]))
            assert local is not None
            assert average is not None
            yield local, average

    def _check_ema(self) -> None:
        if self._ema is None:
            raise ValueError("the optimizer has no averages: build it with ema=EMA(decay=0.9999)")

    def _check_not_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(
                f"{what} inside of swap_ema(), where parameters and averages are exchanged: leave it first"
            )

    def state_dict(self) -> dict[str, Any]:
        self._check_not_swapped("state_dict()")
        return super().state_dict()

    def state_dict_compact(self) -> dict[str, Any]:
        self._check_not_swapped("state_dict_compact()")
        return super().state_dict_compact()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_not_swapped("load_state_dict()")
        super().load_state_dict(state_dict)

    def load_master(self, state_dict: Mapping[str, Any]) -> None:
        """Take masters from the weights of a model in float32, as its `state_dict()` has them.

        Mutates bfloat16 parameters, which become the rounded weights, and their residuals. All else in
        `state_dict` is left to `model.load_state_dict`. Call it after `load_state_dict` of the optimizer,
        which loads residuals as well.

        Args:
            state_dict: Of the model: a tensor of any floating dtype for every parameter that has a master, of
                its shape, under its name or another of its names if it is tied. DTensors and whole tensors
                both do for a parameter that is sharded.

        Raises:
            ValueError: The optimizer was built without `master_weights`; a parameter has no name, or is not
                in `state_dict`. Nothing has changed then.
            RuntimeError: A weight has another shape than its parameter, or parameters and averages have
                traded places. Nothing has changed then.
        """
        self._check_not_swapped("load_master()")
        super().load_master(state_dict)

    def master_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The `state_dict` of a model, with its weights in float32: masters where there are any.

        Args:
            model: The model that the optimizer's parameters belong to.

        Returns:
            `model.state_dict()` with float32 in the place of bfloat16 and float16 weights, which are new
            tensors; all else is the model's own. Tied weights are one tensor under all of their names.

        Raises:
            ValueError: A parameter that has a master is not among the values of `model.state_dict()`.
            RuntimeError: Inside of `swap_ema`, where parameters are not the upper halves of their masters.
        """
        self._check_not_swapped("master_state_dict()")
        return super().master_state_dict(model)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("a copy")
        return super().__getstate__()


def _reshard(model: nn.Module | None) -> None:
    """Let the FSDP2 modules of a model gather their parameters anew."""
    for module in () if model is None else model.modules():
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def _undo(done: list[_Exchange]) -> None:
    """Undo all of them, the last one first; an interrupt on the way is raised when all are undone."""
    interrupt: BaseException | None = None
    while done:
        try:
            done[-1].back()
            done.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
