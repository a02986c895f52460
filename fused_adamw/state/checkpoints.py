"""Whether a saved `state_dict` fits the optimizer that is to load it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..fields import LIKE_PARAMETER
from ..groups import compare_param_names, decay_changes
from .checks import check_not_differentiable, check_saved
from .mismatch import explain_mismatch


def checked_state_dict(
    saved: dict[str, Any],
    live: Sequence[dict[str, Any]],
    names: Sequence[str],
    model: nn.Module | None,
    own: dict[str, Any],
) -> dict[str, Any]:
    """A saved `state_dict`, found to fit an optimizer and with every option that its groups have.

    Warns of options of the checkpoint that change what the optimizer was built to do.

    Args:
        saved: What is to be loaded; it is not changed.
        live: The optimizer's `param_groups`.
        names: The name of each parameter in messages.
        model: The model that the groups were built from, if it is known.
        own: The optimizer's options that are no group options.

    Raises:
        ValueError: As `FusedHygieneAdamW.load_state_dict`.
        RuntimeError: As `FusedHygieneAdamW.load_state_dict`.
    """
    groups = [_without_foreign_names(group) for group in saved["param_groups"]]
    if message := compare_param_names(*([g.get("param_names") for g in some] for some in (groups, live))):
        raise ValueError(f"{message}, or pair them by name: optimizer.load_state_dict_by_name(state_dict)")
    sizes, expected = ([len(g["params"]) for g in some] for some in (groups, live))
    if sizes != expected:
        what = "has a different number of parameter groups"
        if len(sizes) == len(expected):
            what = "contains a parameter group that doesn't match the size of optimizer's group"
        raise ValueError(f"loaded state dict {what}. {explain_mismatch(saved, live, model)}")
    groups = [_completed(*pair) for pair in zip(groups, live, strict=True)]
    check_not_differentiable(groups)
    ids = [i for group in groups for i in group["params"]]
    params = [p for group in live for p in group["params"]]
    for i, p, name in zip(ids, params, names, strict=True):
        state = saved["state"].get(i, {})
        check_shapes(state, p, name, lambda: explain_mismatch(saved, live, model))
        check_saved(state, p, name)
    _warn_of_decay(groups, live)
    _warn_of_own(groups, own)
    return {**saved, "param_groups": groups}


def check_shapes(state: Mapping[str, Any], p: Tensor, name: str, explain: Callable[[], str]) -> None:
    """Refuse saved moments that are not of their parameter's shape.

    Args:
        state: The saved state.
        p: The parameter that is to have it.
        name: Its name in the message.
        explain: Gives the rest of the message.

    Raises:
        RuntimeError: A moment has another shape.
    """
    for key in LIKE_PARAMETER:
        kept = state.get(key)
        if isinstance(kept, Tensor) and kept.shape != p.shape:
            raise RuntimeError(
                f"the saved {key} of parameter {name} is {tuple(kept.shape)} on {kept.device}, expected "
                f"{tuple(p.shape)} on {p.device} like the parameter: the checkpoint is of another model, or "
                f"has its parameters in another order. {explain()}"
            )


def _warn_of_decay(groups: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]) -> None:
    """Say where the checkpoint's weight decay undoes what the groups are for.

    A single group that ceases to decay is none of these: it says no more than the default.
    """
    loaded = [
        {**mine, "weight_decay": group["weight_decay"]} for group, mine in zip(groups, live, strict=True)
    ]
    changes = [c for c in decay_changes(live, loaded) if c.began or len(live) > 1]
    if not changes:
        return
    kept = {change.group: live[change.group]["weight_decay"] for change in changes}
    if len(kept) == 1:
        ((place, decay),) = kept.items()
        line = f'optimizer.param_groups[{place}]["weight_decay"] = {decay}'
    else:
        line = f'for i, decay in {kept}.items(): optimizer.param_groups[i]["weight_decay"] = decay'
    warnings.warn(
        "the checkpoint's weight decay replaces the optimizer's, as every saved option does, and changes "
        f"which parameters decay: {'; '.join(map(str, changes))}. To keep the optimizer's, add after the "
        f"load: {line}",
        stacklevel=2,
    )


def _warn_of_own(groups: Sequence[dict[str, Any]], own: dict[str, Any]) -> None:
    """Say which saved options have no effect here, where they are arguments of the optimizer."""
    for name, ours in own.items():
        saved = {group[name] for group in groups if group.get(name) and group[name] != ours}
        if saved:
            warnings.warn(
                f"the checkpoint's groups have {name}={saved.pop()}, which changes nothing: it is an "
                f"argument of the optimizer, which has {ours}. Pass it to the constructor to go on as saved.",
                stacklevel=2,
            )


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
