"""Resume safety: saved groups against live ones, by parameter name.

torch pairs saved and live parameters by position. Groups in another order, or composed differently, load
without a word when the counts agree, with the wrong decay and the wrong moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .places import canonical


def compare_param_names(
    saved: Sequence[Sequence[str] | None], live: Sequence[Sequence[str] | None]
) -> str | None:
    """Say which parameters are not where they were when a checkpoint was saved.

    Args:
        saved: `param_names` of each saved group; None for a group saved without names.
        live: `param_names` of each live group.

    Returns:
        None if every parameter has its place, or if a group has no names (nothing can be compared);
        otherwise a message that names what moved, what is missing and what is new.
    """
    if any(names is None for names in (*saved, *live)):
        return None
    before = [[canonical(name) for name in names or ()] for names in saved]
    now = [[canonical(name) for name in names or ()] for names in live]
    if before == now:
        return None
    was, is_ = _positions(before), _positions(now)
    problems = []
    moved = [name for name in is_ if name in was and was[name][0] != is_[name][0]]
    if moved:
        said = [f"{name} (saved in group {was[name][0]}, now in group {is_[name][0]})" for name in moved]
        problems.append(f"{_count(len(moved))} moved to another group: {_list(said)}")
    order = [n for n in is_ if n in was and was[n][0] == is_[n][0] and was[n][1] != is_[n][1]]
    missing = [name for name in was if name not in is_]
    new = [name for name in is_ if name not in was]
    if order and not (moved or missing or new):
        problems.append(f"{_count(len(order))} changed place inside a group: {_list(order)}")
    if missing:
        problems.append(f"{_count(len(missing))} only in the checkpoint: {_list(missing)}")
    if new:
        problems.append(f"{_count(len(new))} only in the optimizer: {_list(new)}")
    if len(before) != len(now):
        problems.append(f"the checkpoint has {_count(len(before), 'group')}, the optimizer {len(now)}")
    if not problems:  # the same name twice, or the like
        problems.append("the lists of names differ")
    return (
        "the parameter groups of the checkpoint do not match the optimizer's: "
        + "; ".join(problems)
        + ". torch "
        "pairs parameters by position, so loading would give them the wrong weight decay and moments; build "
        "the groups with the arguments used when it was saved"
    )


def _positions(groups: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    return {name: (g, i) for g, names in enumerate(groups) for i, name in enumerate(names)}


def _count(number: int, noun: str = "parameter") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _list(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
