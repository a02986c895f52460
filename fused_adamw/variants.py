"""Variants of the rule that torch lacks, by group: how decay follows lr, where it acts, Nesterov."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from .tables import Hyper, as_number

DecayMode: TypeAlias = "Literal['lr', 'schedule', 'corrected', 'constant']"

# For each mode, whether weight_decay is divided by the reference lr, and the power of lr that multiplies it.
_MODES = {"lr": (False, 1), "schedule": (True, 1), "corrected": (True, 2), "constant": (False, 0)}


class Variant(NamedTuple):
    """How one group departs from AdamW.

    Attributes:
        weight_decay_mode: What parameters lose of themselves in a step, with lr_ref for the peak of lr: "lr"
            lr * weight_decay; "schedule" weight_decay * lr / lr_ref; "corrected" weight_decay * lr^2 / lr_ref
            (https://arxiv.org/abs/2506.02285); "constant" weight_decay where lr is not 0.
        cautious_weight_decay: Decay only where the update shrinks the parameter too
            (https://arxiv.org/abs/2510.12402).
        nesterov: Step by the momentum that the next step will find, as `torch.optim.NAdam` with a momentum
            that has warmed up.
        lr_ref: The peak of lr; None: the group's `max_lr` or `initial_lr`, which schedulers set, or the lr
            that it came with.
    """

    weight_decay_mode: DecayMode = "lr"
    cautious_weight_decay: bool = False
    nesterov: bool = False
    lr_ref: float | None = None

    @property
    def needs_lr_ref(self) -> bool:
        """Whether decay is relative to the peak of lr."""
        return _MODES[self.weight_decay_mode][0]

    def checked(self, where: str) -> Variant:
        """The same, checked.

        Args:
            where: Follows the name of an option in messages.

        Raises:
            ValueError: An option has a value that it cannot have.
            TypeError: `lr_ref` is no number.
        """
        if self.weight_decay_mode not in _MODES:
            raise ValueError(
                f"weight_decay_mode{where} must be one of {', '.join(map(repr, _MODES))}, got "
                f"{self.weight_decay_mode!r}"
            )
        for name in ("cautious_weight_decay", "nesterov"):
            if getattr(self, name) not in (False, True):
                raise ValueError(f"{name}{where} must be True or False, got {getattr(self, name)!r}")
        if self.lr_ref is None:
            return self
        try:
            lr_ref = as_number(self.lr_ref)
        except (TypeError, ValueError):
            raise TypeError(f"lr_ref{where} must be None or a number, got {self.lr_ref!r}") from None
        if not 0.0 < lr_ref < float("inf"):
            raise ValueError(f"lr_ref{where} must be None or a finite number > 0, got {lr_ref}")
        return self._replace(lr_ref=lr_ref)


VARIANT = Variant._fields


class _OfGroup(NamedTuple):
    variant: Variant
    first_lr: float  # with which the group came


class Variants:
    """The variant of each group.

    A group is known by its dict, whose parameters may be replaced (Accelerate does so for FSDP2), or, where
    that is another one, by a parameter: groups may be replaced and reordered, too.

    Args:
        default: Of groups that say nothing else.
    """

    def __init__(self, default: Variant) -> None:
        self.default = default
        self._of_group: dict[int, _OfGroup] = {}  # by id
        self._of_param: dict[int, _OfGroup] = {}  # by id
        self._is_plain = True  # all of them are
        self._read: dict[int, tuple[Tensor, float]] = {}  # values of tensors on accelerators

    def take(self, group: dict[str, Any], given: Mapping[str, Any], index: int) -> None:
        """Note the options of a new group.

        Args:
            group: The group.
            given: The options of the rule that it came with.
            index: Its position.

        Raises:
            ValueError: An option has a value that it cannot have, or decay is relative to a peak of lr that
                is 0.
            TypeError: `lr_ref` is no number.
        """
        of_group = self._new(self.default._replace(**given).checked(f" in parameter group {index}"), group)
        variant = of_group.variant
        if variant.needs_lr_ref and group["params"] and not self._lr_ref(of_group, group):
            raise ValueError(
                f"lr in parameter group {index} is 0, and weight_decay_mode={variant.weight_decay_mode!r} is "
                "relative to its peak: pass lr_ref=, the largest lr of the schedule"
            )
        self._note(group, of_group)

    def _new(self, variant: Variant, group: Mapping[str, Any]) -> _OfGroup:
        return _OfGroup(variant, self._number(group["lr"]) if variant.needs_lr_ref else 0.0)

    def _note(self, group: Mapping[str, Any], of_group: _OfGroup) -> None:
        self._of_group[id(group)] = of_group
        self._of_param |= dict.fromkeys(map(id, group["params"]), of_group)
        self._is_plain &= of_group.variant == Variant()

    def of(self, group: Mapping[str, Any]) -> Variant:
        """The variant of a group."""
        return self._find(group).variant

    def applied(self, hypers: list[Hyper], groups: Sequence[Mapping[str, Any]]) -> list[Hyper]:
        """The hyper-parameters of all groups, those of the rule included."""
        if self._is_plain:
            return hypers
        applied = [self._applied(*pair) for pair in zip(hypers, groups, strict=True)]
        if len(self._of_group) > len(groups):  # another dict may come to where one was that is no more
            self._of_group = {id(group): self._of_group[id(group)] for group in groups}
        return applied

    def _applied(self, hyper: Hyper, group: Mapping[str, Any]) -> Hyper:
        found = self._find(group)
        if found.variant == Variant():
            return hyper
        is_relative, power = _MODES[found.variant.weight_decay_mode]
        decay = hyper.weight_decay
        if is_relative:
            decay /= self._lr_ref(found, group)
        return hyper._replace(
            weight_decay=decay,
            decay_power=power,
            cautious=found.variant.cautious_weight_decay,
            nesterov=found.variant.nesterov,
        )

    def _find(self, group: Mapping[str, Any]) -> _OfGroup:
        found = self._of_group.get(id(group))
        if found is None:
            known = (self._of_param.get(id(p)) for p in group["params"])
            found = next((each for each in known if each is not None), None)
            found = self._new(self.default, group) if found is None else found
            self._note(group, found)
        return found

    def _lr_ref(self, of_group: _OfGroup, group: Mapping[str, Any]) -> float:
        """The peak of a group's lr; 0: not known."""
        if of_group.variant.lr_ref is not None:
            return of_group.variant.lr_ref
        known = (group[name] for name in ("max_lr", "initial_lr") if group.get(name) is not None)
        return next(filter(None, map(self._number, known)), of_group.first_lr)

    def _number(self, value: Any) -> float:
        """The value as a float; of a tensor on an accelerator, as it was when first seen: reading waits."""
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return as_number(value)
        if id(value) not in self._read:
            self._read[id(value)] = (value, float(value))
        return self._read[id(value)][1]

    def by_position(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Variant, list[_OfGroup]]:
        """What `from_positions` restores, for groups that take the place of these."""
        return self.default, list(map(self._find, groups))

    @classmethod
    def from_positions(
        cls, saved: tuple[Variant, list[_OfGroup]], groups: Sequence[Mapping[str, Any]]
    ) -> Variants:
        """The variants of groups that were copied or loaded."""
        default, of_groups = saved
        variants = cls(default)
        for group, of_group in zip(groups, of_groups, strict=True):
            variants._note(group, of_group)
        return variants
