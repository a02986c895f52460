"""Whether a saved `state_dict` fits the optimizer that is to load it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from .checks import check_not_differentiable, check_saved
from .groups import compare_param_names


class NamedGroup(dict[str, Any]):
    """A parameter group that leaves `param_names` out when its keys are iterated.

    torch.distributed.checkpoint looks up every key of a group in a flattened checkpoint. One saved by an
    optimizer without names has no `param_names`, and need not: names are not loaded.
    """

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if key != "param_names")


def checked_state_dict(
    saved: dict[str, Any], live: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """A saved `state_dict`, found to fit an optimizer and with every option that its groups have.

    Args:
        saved: What is to be loaded; it is not changed.
        live: The optimizer's `param_groups`.
        names: The name of each parameter in messages.

    Raises:
        ValueError: As `FusedHygieneAdamW.load_state_dict`.
        RuntimeError: As `FusedHygieneAdamW.load_state_dict`.
    """
    groups = [_without_foreign_names(group) for group in saved["param_groups"]]
    if message := compare_param_names(*([g.get("param_names") for g in some] for some in (groups, live))):
        raise ValueError(message)
    if [len(g["params"]) for g in groups] == [len(g["params"]) for g in live]:  # else torch raises
        groups = [_completed(*pair) for pair in zip(groups, live, strict=True)]
        check_not_differentiable(groups)
        ids = [i for group in groups for i in group["params"]]
        params = [p for group in live for p in group["params"]]
        for i, p, name in zip(ids, params, names, strict=True):
            check_saved(saved["state"].get(i, {}), p, name)
    return {**saved, "param_groups": groups}


def _without_foreign_names(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group, without `param_names` if it lists parameters by name.

    torch.distributed.checkpoint does so after pairing them by name; the `param_names` are then those of the
    group that the options came from.
    """
    if any(isinstance(param, str) for param in group["params"]):
        return {key: value for key, value in group.items() if key != "param_names"}
    return group


def _completed(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """A saved group, with the live group's value for every option that it does not have."""
    if "lr" not in saved:
        warnings.warn(
            f"the checkpoint has no options for a group of {len(live['params'])} parameters, which keeps its "
            "own: torch.distributed.checkpoint gives the options of a saved group to one group alone. Save "
            "with flatten_optimizer_state_dict=True to give them to every parameter.",
            stacklevel=2,
        )
    options = {key: value for key, value in live.items() if key not in ("params", "param_names")}
    return {**options, **saved}
