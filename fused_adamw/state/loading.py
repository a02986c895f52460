"""Saving and loading: by position as torch does, or by name into other groups."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..arguments import OwnArguments
from ..fields import AVERAGE, RESIDUAL, STATE_KEYS
from ..formats import Format
from ..groups import Options, decide
from ..names import ParamNames
from .checkpoints import checked_state_dict
from .contents import copied_state, saved_state
from .precision import Kept
from .purposes import Purpose, Purposes
from .regroup import Names, regrouped


class Checkpointed(OwnArguments):
    """The part of the optimizer that knows the names of its parameters, and what may be loaded."""

    _model: weakref.ref[nn.Module] | None = None  # what the groups were built from; a copy does not know it
    _param_names: ParamNames
    _purposes: Purposes

    def _names(self) -> list[str]:
        """How messages refer to each parameter."""
        return [
            f"number {i} of group {index}" if name is None else repr(name)
            for index, group in enumerate(self.param_groups)
            for i, name in enumerate(self._param_names.of(group))
        ]

    def _all_purposes(self) -> list[Purpose]:
        """What each parameter is for, in the order of the groups."""
        return [
            self._purposes.of(name) for group in self.param_groups for name in self._param_names.of(group)
        ]

    def _learn_purposes(self, group: dict[str, Any]) -> None:
        """Find out what the parameters of a group are for that a model got since its groups were built."""
        model = None if self._model is None else self._model()
        is_asked = self._precision.has_codes or self._precision.state_roles
        if model is None or not is_asked or all(map(self._purposes.knows, self._param_names.of(group))):
            return
        self._purposes.learn(decide(model, Options(), allow_none=True))

    def _kept(self) -> list[Kept]:
        """How each parameter and its moments are to be kept, in the order of the groups.

        Raises:
            ValueError: A parameter cannot have the master that was asked for.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        for p, name in zip(params, self._names(), strict=True):
            if (refusal := self._precision.refusal(p)) is not None:
                raise ValueError(f"parameter {name} {refusal}")
        purposes = self._all_purposes()
        return [self._precision.formats_of(p, *what) for p, what in zip(params, purposes, strict=True)]

    def _average_format(self, p: Tensor) -> Format | None:
        """How the average of a parameter is kept; None: there is none."""
        return None if self._ema is None else self._ema.format_of(p)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with torch's keys: moments kept in 8 bits are float32 there.

        Loading them gives the same 8 bits again. Where bfloat16 parameters have masters, each state has a
        `master_residual` besides. `param_names` of a group whose parameters were edited are those of its
        parameters now, or absent where they are not known.
        """
        self._param_names.correct(self.param_groups)
        handle = self.register_state_dict_post_hook(_decode, prepend=True)  # users see what is saved
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @_disable_dynamo
    def state_dict_compact(self) -> dict[str, Any]:
        """A `state_dict` with moments as they are kept, in 8 bits too: a quarter of the size.

        `load_state_dict` of this class takes it; torch's AdamW does not. Each state that is kept in 8 bits
        has `exp_avg_code` (int8), `exp_avg_sq_code` (uint8), and for both a `_scale` (float32).
        """
        self._param_names.correct(self.param_groups)
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this class or of `torch.optim.AdamW`/`Adam`, whose groups must be the same.

        Moments take the parameter's layout, and `state_dtype` where it is set. Options that a saved group
        lacks stay as they are, all others replace the optimizer's, as in torch; a warning says where
        parameters begin or cease to decay by that. Nothing is shared with `state_dict` afterwards.

        To load a file of torch.distributed.checkpoint that was saved without `param_names` into an optimizer
        that has them, give `dcp.load` a `DefaultLoadPlanner(allow_partial_load=True)`.

        Args:
            state_dict: As returned by `state_dict`.

        Raises:
            ValueError: The groups do not match the optimizer's: in number, in size, or, where both have
                `param_names`, in which parameters they hold; the message says whose groups these may be and
                what loads them. Or a moment is a DTensor where the parameter is not, or the other way round,
                or is on another mesh.
            RuntimeError: A saved state is not AdamW's: a step count or a moment is missing (that of another
                optimizer, say), or a moment is not of its parameter's shape; a group is `differentiable`. Or
                torch's `load_state_dict` has cast a residual, codes or scales to the parameter's dtype, or
                moments that are kept in 8 bits here.
        """
        copies: dict[Tensor, dict[str, Tensor]] = {}
        own = {"max_grad_norm": self._max_grad_norm, "skip_nonfinite": self._skip_nonfinite}
        model = None if self._model is None else self._model()

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            self._param_names.correct(self.param_groups)
            final = checked_state_dict(given, self.param_groups, self._names(), model, own)
            copies.update(self._copies(final))
            return final

        def put(_: Any) -> None:
            """Torch has cast moments to the parameter's dtype, or shares them with what was loaded."""
            for p, of_p in copies.items():
                mine = self.state[p]
                for key in set(STATE_KEYS).intersection(mine).difference(of_p):
                    del mine[key]  # kept otherwise here
                mine.update(of_p)

        handles = [
            self.register_load_state_dict_pre_hook(check),  # the last one: it sees what will be loaded
            self.register_load_state_dict_post_hook(put, prepend=True),  # the first: users have the last word
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _shown_to_dcp(self, flat: Mapping[str, Any], names: Mapping[Tensor, Iterable[str]]) -> Any:
        """Stands for the optimizer where a flattened checkpoint is asked for what its states have.

        Args:
            flat: The checkpoint.
            names: Of every parameter, those in the checkpoint.
        """
        saved = {p: saved_state(of_p) for p, of_p in self.state.items()}
        if all(of_p is self.state[p] for p, of_p in saved.items()):
            return self
        for p, of_p in saved.items():
            if RESIDUAL in of_p and not any(f"state.{name}.{RESIDUAL}" in flat for name in names.get(p, ())):
                saved[p] = {key: value for key, value in of_p.items() if key != RESIDUAL}
        return SimpleNamespace(param_groups=self.param_groups, state=saved)

    def load_state_dict_by_name(
        self, state_dict: Mapping[str, Any], names: Names | None = None, *, strict: bool = True
    ) -> None:
        """Load a `state_dict` that has other groups: the state of every parameter, found by its name.

        So a run of `torch.optim.AdamW(model.parameters())` goes on in the groups of this optimizer:

            optimizer = FusedHygieneAdamW(model, lr=3e-4, weight_decay=0.1)
            saved = torch.load("optimizer.pt", weights_only=True)
            optimizer.load_state_dict_by_name(saved, model.named_parameters())

        The weight decay of every group stays as it is. Other saved options (`lr`, `betas`, a scheduler's
        `initial_lr`) replace the optimizer's, except where the saved groups that meet in one group disagree,
        and except for learning rates where this optimizer has several and the checkpoint one.

        Args:
            state_dict: As returned by `state_dict`; or with names in place of numbers, as
                torch.distributed.checkpoint and FSDP return it in nested form.
            names: The checkpoint's parameters in its order: names, `model.named_parameters()`, or groups with
                `param_names` such as `build_param_groups(model, policy="nanogpt")` returns. None: the names
                that the checkpoint has.
            strict: Whether every parameter must be in the checkpoint, and every saved state in the optimizer.
                If not, the former start without a state and the latter are dropped.

        Raises:
            ValueError: The optimizer has no names; `names` are missing, too few or too many, or ambiguous;
                `strict` is violated; or as in `load_state_dict`.
            RuntimeError: As in `load_state_dict`.
        """
        self._param_names.correct(self.param_groups)
        if not all("param_names" in group for group in self.param_groups):
            raise ValueError(
                "the optimizer's parameters have no names to be found by: build it from the model, from "
                "model.named_parameters(), or from groups that have param_names"
            )
        mine = [name for group in self.param_groups for name in group["param_names"]]
        self.load_state_dict(regrouped(state_dict, self.param_groups, mine, names, strict))

    @torch.inference_mode(False)  # tensors made in inference mode could not be updated outside of it
    @torch.no_grad()
    def _copies(self, saved: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Copies of the saved state that belongs to parameters."""
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        columns = zip(ids, params, self._names(), self._kept(), strict=False)  # torch refuses other numbers
        mine = [(saved["state"][i], *of_p) for i, *of_p in columns if i in saved["state"]]
        dropped = [name for of_p, _, name, kept in mine if RESIDUAL in of_p and kept.param.side_dtype is None]
        if dropped:
            warnings.warn(
                f"the checkpoint has masters of {len(dropped)} parameters, {dropped[0]} among them, which "
                "are rounded to the parameters' dtype: to go on with them, build the optimizer with "
                "master_weights='split'.",
                stacklevel=2,
            )
        dropped = [name for of_p, _, name, _ in mine if AVERAGE in of_p and self._ema is None]
        if dropped:
            warnings.warn(
                f"the checkpoint has averages of {len(dropped)} parameters, {dropped[0]} among them, which "
                "are dropped: to go on with them, build the optimizer with ema=EMA(...).",
                stacklevel=2,
            )
        return {p: copied_state(of_p, p, name, kept, self._average_format(p)) for of_p, p, name, kept in mine}


@torch.no_grad()
def _decode(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put moments in floating point in the place of codes: changes the dict of states, but none of these."""
    ids = {i for group in saved["param_groups"] for i in group["params"]}
    for i in ids.intersection(saved["state"]):
        saved["state"][i] = saved_state(saved["state"][i])
