"""What is known of tensors in a forward pass: labels, and what was seen of each parameter.

A tensor is a `Weight` if it is made of parameters alone (views, casts, parametrizations), `Data` if the input
is in it; others have no label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .kinds import Kind

Key = int  # identity of a parameter
SIDES = frozenset({"left", "right"})  # of a product of two parameters


@dataclass(frozen=True)
class Trail:
    """What happened to a parameter before activations met it.

    Attributes:
        shape: Its own shape.
        steps: The `STEPS` it took, and `left` or `right` if it was multiplied with another parameter.
    """

    shape: tuple[int, ...]
    steps: frozenset[str] = frozenset()

    @property
    def is_vector(self) -> bool:
        return sum(n != 1 for n in self.shape) <= 1

    def after(self, step: str) -> Trail:
        if step in SIDES and self.steps & SIDES:
            return self  # only the first product tells what it is: a map's result may be a factor again
        return Trail(self.shape, self.steps | {step})

    @property
    def is_table(self) -> bool:
        """Whether single rows were picked from it, and not matrices."""
        return "picked" in self.steps and len(self.shape) == 2


@dataclass(frozen=True)
class Weight:
    """Made of parameters alone: the parameters that give it its values."""

    trails: Mapping[Key, Trail]

    def after(self, step: str) -> Weight:
        return Weight({key: trail.after(step) for key, trail in self.trails.items()})


@dataclass(frozen=True)
class Scaled:
    """A parameter by which activations were just scaled.

    Attributes:
        shape: Its shape, aligned with the product's.
        spreads: Whether the product varies along dimensions of the parameter where the activations do not.
    """

    shape: tuple[int, ...]
    spreads: bool


@dataclass(frozen=True)
class Product:
    """Activations times parameters, as long as it is known which dimension the parameters gave it.

    Attributes:
        keys: The parameters.
        dim: That dimension; None once a part of it was taken.
        size: Its size.
        is_shares: Whether softmax was taken over it.
    """

    keys: frozenset[Key]
    dim: int | None
    size: int
    is_shares: bool = False


@dataclass(frozen=True)
class Data:
    """Depends on the input.

    Attributes:
        source: Which floating-point input it is, if no parameter has touched it yet.
        makers: The parameters of the map whose result it is.
        scaled: The parameters that just scaled it.
        is_linear: Whether nothing but views and scales came after that map.
        product: The same map's result with its dimensions, while these are known.
        compared: The parameters with which the linear result of another map was multiplied.
        is_scores: Whether it is the product of activations with activations.
        chosen: The maps from whose results the largest were chosen.
        parts: How many maps made it, side by side.
    """

    source: int | None = None
    makers: frozenset[Key] = frozenset()
    scaled: Mapping[Key, Scaled] = field(default_factory=dict)
    is_linear: bool = False
    product: Product | None = None
    compared: frozenset[Key] = frozenset()
    is_scores: bool = False
    chosen: frozenset[Key] = frozenset()
    parts: int = 1


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that an operator is given."""

    argument: str
    tensor: Tensor
    label: Weight | Data | None


@dataclass(frozen=True, eq=False)
class Call:
    """An operator that ran.

    Attributes:
        name: Its name, without namespace, overload and the underscore of in-place variants.
        args: Its positional arguments.
        operands: The tensors among its arguments.
        results: The tensors that it returned.
    """

    name: str
    args: tuple[Any, ...]
    operands: Sequence[Operand]
    results: Sequence[Tensor]

    @property
    def weights(self) -> list[tuple[Operand, Weight]]:
        return [(o, o.label) for o in self.operands if isinstance(o.label, Weight)]

    @property
    def data(self) -> list[tuple[Operand, Data]]:
        return [(o, o.label) for o in self.operands if isinstance(o.label, Data)]


@dataclass
class Uses:
    """What a forward pass did with the parameters, by identity.

    Attributes:
        kinds: The kinds of use of each.
        reached: The parameters that any operator read.
        inputs: The first maps on each floating-point input, by its number.
        outputs: The maps whose result is the model's output.
        routers: The maps by whose result experts are chosen or weighed.
        layers: The maps whose result gets a bias or an activation function.
        ambiguous: Parameters that were multiplied and summed, as gains and maps may be.
    """

    kinds: dict[Key, set[Kind]] = field(default_factory=dict)
    reached: set[Key] = field(default_factory=set)
    inputs: dict[int, set[Key]] = field(default_factory=dict)
    outputs: set[Key] = field(default_factory=set)
    routers: set[Key] = field(default_factory=set)
    layers: set[Key] = field(default_factory=set)
    ambiguous: set[Key] = field(default_factory=set)

    def add(self, weight: Weight, kind: Kind, only: Callable[[Trail], bool] = lambda trail: True) -> None:
        """Note a use of the parameters in `weight` whose trail passes `only`."""
        for key, trail in weight.trails.items():
            if only(trail):
                self.kinds.setdefault(key, set()).add(kind)

    def retell(self, key: Key, kind: Kind, seemed: Kind = Kind.GAIN) -> None:
        """Replace what a use seemed to be by what it turned out to be."""
        kinds = self.kinds.setdefault(key, set())
        kinds.discard(seemed)
        kinds.add(kind)

    def add_arguments(self, call: Call, arguments: Mapping[str, Kind], *kinds: Kind) -> None:
        """Note the uses of these kinds that an operator's table of arguments has."""
        for operand, weight in call.weights:
            kind = arguments.get(operand.argument)
            if kind is not None and kind in kinds:
                self.add(weight, kind)

    @property
    def first_maps(self) -> set[Key]:
        """The maps on data: on the first input all; a later one that many maps read is a condition."""
        first = min(self.inputs, default=0)
        return {key for n, keys in self.inputs.items() if n == first or len(keys) == 1 for key in keys}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, through tuples, lists, mappings and objects that are one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a wrapper subclass, a quantised weight say, is made of, however deep."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if callable(flatten):
        for name in flatten()[0]:
            part = getattr(tensor, name)
            yield part
            yield from parts_of(part)
