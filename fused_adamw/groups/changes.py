"""Which parameters began or ceased to decay: one list of groups against another, tensor by tensor.

A checkpoint's options replace those of the live groups when it is loaded, as in torch. So groups that were
exempt from decay may decay afterwards, and nothing else tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .places import tensors_of


@dataclass(frozen=True)
class DecayChange:
    """Parameters of one group that began or ceased to decay.

    Attributes:
        group: The group's place in the later list.
        names: Names of these parameters, or `()` if the group has none.
        count: How many parameters these are.
        before: The weight decay that they had, the largest if they came from several groups.
        after: The weight decay that they have.
    """

    group: int
    names: tuple[str, ...]
    count: int
    before: float
    after: float

    @property
    def began(self) -> bool:
        """Whether they decay now and did not before."""
        return self.after > 0

    def __str__(self) -> str:
        """`group 1: 100 parameters (0.bias, …) had weight_decay=0 and have 0.01`."""
        shown = ", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")
        who = "1 parameter" if self.count == 1 else f"{self.count} parameters"
        have = "has" if self.count == 1 else "have"
        named = f" ({shown})" if shown else ""
        return f"group {self.group}: {who}{named} had weight_decay={self.before:g} and {have} {self.after:g}"


def decay_changes(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]
) -> list[DecayChange]:
    """Compare two lists of groups, such as `optimizer.param_groups` before and after a load.

    Args:
        before: The earlier groups. Tensors are compared by identity, so `torch.optim` groups that
            `load_state_dict` replaced will do: they hold the same tensors.
        after: The later groups. A tensor that is in one list only is not compared.

    Returns:
        One entry per later group in which parameters began or ceased to decay; a change from one positive
        weight decay to another is none.
    """
    earlier = {id(p): _decay(group) for group in before for p in tensors_of(group)}
    changes = []
    for place, group in enumerate(after):
        now = _decay(group)
        params = tensors_of(group)
        changed = [i for i, p in enumerate(params) if (earlier.get(id(p), now) > 0) != (now > 0)]
        if changed:
            names = group.get("param_names") or ()
            changes.append(
                DecayChange(
                    group=place,
                    names=tuple(names[i] for i in changed) if len(names) == len(params) else (),
                    count=len(changed),
                    before=max(earlier[id(params[i])] for i in changed),
                    after=now,
                )
            )
    return changes


def _decay(group: Mapping[str, Any]) -> float:
    return float(group.get("weight_decay", 0.0))
