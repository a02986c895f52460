"""How parameters are called: in messages, in `param_names`, in flattened checkpoints."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .groups import canonical


class ParamNames:
    """The name of each parameter of an optimizer.

    Groups list parameters and names side by side, and whoever edits one list may leave the other as it was.
    So it is noted which lists belong together, by the ids of parameters: it keeps none alive.

    Args:
        model: The model that the optimizer was built from; None: there is none, or it is not known.
    """

    def __init__(self, model: weakref.ref[nn.Module] | None = None) -> None:
        self._model = model
        self._noted: dict[tuple[str, ...], list[int]] = {}  # by names, the ids of their parameters

    def learn(self, group: dict[str, Any]) -> None:
        """Note that the names of a group are those of its parameters."""
        if "param_names" in group and len(group["param_names"]) == len(group["params"]):
            self._noted[tuple(group["param_names"])] = list(map(id, group["params"]))

    def _in_model(self) -> dict[int, str]:
        """By its id, the name of each parameter that the model has now, the frozen ones too."""
        model = None if self._model is None else self._model()
        return {} if model is None else {id(p): canonical(name) for name, p in model.named_parameters()}

    def of(self, group: dict[str, Any]) -> Sequence[str | None]:
        """The name of each parameter of a group, None where it is not known."""
        names, ids = tuple(group.get("param_names", ())), list(map(id, group["params"]))
        noted = self._noted.get(names, ids)  # names that were not noted are the user's
        if len(names) == len(ids) and noted == ids:
            return names
        in_model = self._in_model()
        known = [in_model.get(i) for i in ids]
        if noted == ids[: len(names)]:  # others were appended
            known[: len(names)] = names
        return known

    def correct(self, groups: Iterable[dict[str, Any]]) -> None:
        """Replace `param_names` that are not those of a group's parameters; drop them if some are unknown."""
        for group in groups:
            if "param_names" not in group or (names := self.of(group)) == tuple(group["param_names"]):
                continue
            if None in names:
                del group["param_names"]
            else:
                group["param_names"] = names
                self.learn(group)

    def complete(self, groups: Iterable[dict[str, Any]]) -> None:
        """Give names to groups of tensors that have none: the known ones, else numbers."""
        in_model = self._in_model()
        for index, group in enumerate(groups):
            if not isinstance(group, dict) or "param_names" in group:
                continue
            params = group.get("params", ())
            if isinstance(params, set) or not isinstance(params, Iterable):
                continue  # refused by torch
            params = [params] if isinstance(params, Tensor) else list(params)
            group["params"] = params
            if all(isinstance(p, Tensor) for p in params):
                group["param_names"] = [
                    in_model.get(id(p), f"number {i} of group {index}") for i, p in enumerate(params)
                ]


_SHOWN = "_fused_adamw_names"


def show_names_to_dcp() -> None:
    """Let torch.distributed.checkpoint load flattened checkpoints without names into groups with names.

    It looks up every option of a live group in the checkpoint, and so `param_names`, which are not loaded: a
    checkpoint of `torch.optim.AdamW(model.parameters())` would raise KeyError. Where a checkpoint has none,
    those of the live groups are added, for optimizers of this package alone. It looks up the keys of live
    states too, which are others where moments are kept as codes: it is shown those that are saved. A no-op
    until the module, which takes seconds, is imported.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is not None and not hasattr(module, _SHOWN):
        _show_names_to(module)


def _show_names_to(module: ModuleType) -> None:
    unflatten = getattr(module, "_unflatten_optim_state_dict", None)
    if unflatten is None:  # not yet, or not in this version
        return

    def with_names(optim: Any, state_dict: dict[str, Any], info: Any) -> Any:
        if getattr(optim, "_names_are_ours", False):
            names = {
                f"param_groups.{fqn}.param_names": group["param_names"]
                for group in optim.param_groups
                if "param_names" in group
                for p in group["params"]
                for fqn in info.fqn_param_mapping[p]
            }
            state_dict = {**names, **state_dict}
        if (shown := getattr(optim, "_shown_to_dcp", None)) is not None:
            optim = shown(state_dict, info.fqn_param_mapping)
        return unflatten(optim, state_dict, info)

    module._unflatten_optim_state_dict = with_names  # type: ignore[attr-defined]
    setattr(module, _SHOWN, True)
