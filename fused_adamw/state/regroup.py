"""Carries a checkpoint over into other groups, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..groups.places import canonical
from .checkpoints import check_shapes

# The parameters of a saved optimizer, by name: what it was given, had it been given names.
Names: TypeAlias = "Iterable[str | tuple[str, Tensor] | Mapping[str, Any]]"

# Options of a group that say how large its steps are, apart from decay.
_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")


def names_of(saved: Names) -> list[str]:
    """The names of parameters in order, canonical: of names alone, of named parameters, or of groups.

    Raises:
        ValueError: A group has no `param_names`.
    """
    found: list[str] = []
    for item in saved:
        if isinstance(item, Mapping):
            if len(item.get("param_names", ())) != len(item["params"]):
                raise ValueError("names: expected groups that list their parameters' names as param_names")
            found += item["param_names"]
        else:
            found.append(item if isinstance(item, str) else item[0])
    return [canonical(name) for name in found]


def regrouped(
    saved: Mapping[str, Any],
    live: Sequence[Mapping[str, Any]],
    live_names: Sequence[str],
    names: Names | None,
    strict: bool,
) -> dict[str, Any]:
    """A saved `state_dict` in the groups of another optimizer, parameters paired by name.

    Args:
        saved: The saved `state_dict`; it is not changed, and its tensors are shared.
        live: The optimizer's `param_groups`.
        live_names: The name of each of its parameters.
        names: The name of each saved parameter in the order of the checkpoint, for `names_of`; None: the
            names in the checkpoint.
        strict: Whether both must have the same parameters, apart from saved ones without a state.

    Returns:
        A `state_dict` of the optimizer: the saved state of each of its parameters, and its groups, with the
        options of the saved groups except `weight_decay`. Where saved groups that meet in one group differ in
        an option, and where the optimizer has several learning rates and the checkpoint one, the optimizer's
        own option stays.

    Raises:
        ValueError: `names` do not fit the checkpoint, or `strict` is violated.
        RuntimeError: A saved moment is not of the shape of the parameter that is called so.
    """
    saved_groups = saved["param_groups"]
    ids = [i for group in saved_groups for i in group["params"]]
    owners = [group for group in saved_groups for _ in group["params"]]
    found = _own_names(saved_groups) if names is None else names_of(names)
    if found is None:
        raise ValueError(
            "the checkpoint has no names of parameters: pass them in its order, as model.named_parameters() "
            "for torch.optim.AdamW(model.parameters()), or as groups that have param_names"
        )
    if len(found) != len(ids) or len(set(found)) != len(found):
        raise ValueError(
            f"names: expected one for each of the checkpoint's {len(ids)} parameters, all different, got "
            f"{len(found)}, of which {len(set(found))} are different"
        )
    place = {name: i for i, name in enumerate(found)}
    wanted = [canonical(name) for name in live_names]
    if strict:
        unused = set(found).difference(wanted)
        _check_same(
            [name for name in wanted if name not in place],
            [name for name in found if name in unused and ids[place[name]] in saved["state"]],
        )

    one_rate = len({_key(group.get("lr")) for group in saved_groups}) == 1
    kept = {"params", "param_names", "weight_decay"}
    if one_rate and len({_key(group.get("lr")) for group in live}) > 1:
        kept.update(_LEARNING_RATES)
    state = {key: value for key, value in saved["state"].items() if key not in set(ids)}  # no parameter's
    groups, start = [], 0
    for group in live:
        mine = wanted[start : start + len(group["params"])]
        places = [place.get(name) for name in mine]
        for i, (at, p, name) in enumerate(zip(places, group["params"], mine, strict=True), start):
            if at is not None and ids[at] in saved["state"]:
                state[i] = saved["state"][ids[at]]
                check_shapes(state[i], p, repr(name), lambda: "Are names in the order of the checkpoint?")
        options = {key: value for key, value in group.items() if key != "params"}
        options |= _agreed([owners[at] for at in places if at is not None], kept)
        groups.append({**options, "params": list(range(start, start + len(mine)))})
        start += len(mine)
    return {**saved, "state": state, "param_groups": groups}


def _own_names(groups: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The names in a checkpoint: beside its parameters, or in their place, as in full state dicts of FSDP."""
    found: list[str] = []
    for group in groups:
        names = group["params"]
        if not all(isinstance(name, str) for name in names):
            names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            return None
        found += map(canonical, names)
    return found


def _check_same(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    problems = [
        f"{len(names)} only in the {where}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for names, where in ((missing, "optimizer"), (unexpected, "checkpoint"))
        if names
    ]
    if problems:
        raise ValueError(
            f"the checkpoint has other parameters than the optimizer: {'; '.join(problems)}. With "
            "strict=False the former start without a state, and the latter are dropped."
        )


def _agreed(groups: Sequence[Mapping[str, Any]], kept: Iterable[str]) -> dict[str, Any]:
    """The options on which all of some saved groups agree, without those that are kept."""
    if not groups:
        return {}
    first = groups[0]
    return {
        key: value
        for key, value in first.items()
        if key not in kept and all(key in g and _key(g[key]) == _key(value) for g in groups)
    }


def _key(value: Any) -> Any:
    """A value that compares as Python's do, of a tensor too."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return value.tolist() if isinstance(value, Tensor) else value
