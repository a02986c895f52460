"""Following parameters through a forward pass, operator by operator.

Each tensor carries one of two labels, or none: `Weight` if it is made of parameters alone (views, casts,
parametrizations), `Data` if the input is in it. Where the two meet, the operator tells how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .kinds import (
    ACTIVATIONS,
    ARGUMENTS,
    CONVOLUTIONS,
    EXPONENTIALS,
    PASSING,
    PERIODIC,
    PRODUCTS,
    SCALING,
    SHIFTING,
    STEPS,
    SUMS,
    Kind,
)

Key = int  # identity of a parameter
_SIDES = frozenset({"left", "right"})


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
        if step in _SIDES and self.steps & _SIDES:
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
class Data:
    """Depends on the input.

    Attributes:
        raw: Whether it is the first floating-point input, and no parameter has touched it yet.
        makers: The parameters of the map whose result it is.
        scaled: The parameters that just scaled it.
    """

    raw: bool = False
    makers: frozenset[Key] = frozenset()
    scaled: Mapping[Key, Scaled] = field(default_factory=dict)


@dataclass
class Uses:
    """What a forward pass did with the parameters, by identity.

    Attributes:
        kinds: The kinds of use of each.
        reached: The parameters that any operator read.
        inputs: The maps on the model's first floating-point input.
        outputs: The maps whose result is the model's output.
        routers: The maps whose result `topk` chooses from.
        ambiguous: Parameters that were multiplied and summed, as gains and maps may be.
    """

    kinds: dict[Key, set[Kind]] = field(default_factory=dict)
    reached: set[Key] = field(default_factory=set)
    inputs: set[Key] = field(default_factory=set)
    outputs: set[Key] = field(default_factory=set)
    routers: set[Key] = field(default_factory=set)
    ambiguous: set[Key] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class _Operand:
    argument: str
    tensor: Tensor
    label: Weight | Data | None


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels what every operator returns, and notes how parameters are used."""

    def __init__(self, parameters: Mapping[Key, Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses = Uses()
        self._labels: Any = WeakIdKeyDictionary()
        for key, tensor in parameters.items():
            self._labels[tensor] = Weight({key: Trail(tuple(tensor.shape))})
        main = next((t for t in inputs if t.is_floating_point()), None)  # the others are conditions
        for tensor in inputs:
            self._labels[tensor] = Data(raw=tensor is main)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result

    def finish(self, output: Any) -> Uses:
        """Note the last maps before the model's first output, and return what was seen."""
        first = next(tensors_in(output), None)
        label = None if first is None else self._labels.get(first)
        if isinstance(label, Data):
            self.uses.outputs |= label.makers
        return self.uses

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        name = name.rstrip("_") if not name.endswith("__") else name
        if name.endswith("_like") or name.startswith("new_"):
            return  # only the shape counts
        operands = list(self._operands(func, args, kwargs))
        weights = [o for o in operands if isinstance(o.label, Weight)]
        data = [o for o in operands if isinstance(o.label, Data)]
        for operand in weights:
            self.uses.reached |= set(operand.label.trails)  # type: ignore[union-attr]
        results = list(tensors_in(result))
        label: Weight | Data | None = None
        if data:
            label = self._meet(name, operands, weights, data, args, results)
        elif weights:
            label = self._combine(name, operands, weights, results)
        if label is None:
            return
        written = operands[0].tensor if operands and func._schema.is_mutable else None
        for tensor in results:
            self._labels[tensor] = label
        if written is not None:
            self._labels[written] = label
            if written._base is not None and not isinstance(self._labels.get(written._base), Data):
                self._labels[written._base] = label

    def _operands(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[_Operand]:
        named = zip((a.name for a in func._schema.arguments), args, strict=False)
        for name, value in (*named, *kwargs.items()):
            for tensor in tensors_in(value):
                yield _Operand(name, tensor, self._labels.get(tensor))

    def _use(self, weight: Weight, kind: Kind, only: Callable[[Trail], bool] = lambda trail: True) -> None:
        for key, trail in weight.trails.items():
            if only(trail):
                self.uses.kinds.setdefault(key, set()).add(kind)

    # Parameters among themselves.

    def _combine(
        self, name: str, operands: list[_Operand], weights: list[_Operand], results: list[Tensor]
    ) -> Weight | None:
        """Label what is made of parameters alone."""
        labels = {o.argument: o.label for o in weights if isinstance(o.label, Weight)}
        arguments = ARGUMENTS.get(name, {})
        if name in PRODUCTS:
            self._use_arguments(arguments, weights, Kind.BIAS, Kind.SHIFT)
            left, right = (labels.get(argument) for argument in PRODUCTS[name])
            if name in CONVOLUTIONS and right is not None:
                self._use(right, Kind.CONVOLUTION)
                return left
            if left is None or right is None:  # multiplied with a constant: a map, rows, who knows
                return None
            return Weight({**right.after("right").trails, **left.after("left").trails})
        if name.endswith("norm") and "weight" in arguments:
            self._use_arguments(arguments, weights, Kind.GAIN, Kind.SHIFT)
            return labels.get("input")
        label = self._elementwise(name, weights, results)
        return label.after(STEPS[name]) if name in STEPS else label

    def _elementwise(self, name: str, weights: list[_Operand], results: list[Tensor]) -> Weight:
        """Merge parameters: those as large as the result make it up, smaller ones scale or shift it."""
        size = max((t.numel() for t in results), default=0)
        large = [o for o in weights if o.tensor.numel() >= size] or weights
        trails: dict[Key, Trail] = {}
        for operand in large:
            assert isinstance(operand.label, Weight)
            for key, trail in operand.label.trails.items():
                known = trails.get(key, trail)
                trails[key] = Trail(trail.shape, known.steps | trail.steps)
        for operand in weights:
            assert isinstance(operand.label, Weight)
            if operand not in large and name in SCALING and not operand.label.trails.keys() & trails.keys():
                self._use(operand.label, Kind.GAIN)
        if name in SHIFTING and len(large) == 2:
            self._find_spread(large, trails)
        return Weight(trails)

    def _find_spread(self, pair: list[_Operand], trails: dict[Key, Trail]) -> None:
        """`mean + softplus(rho) * noise`: of two summands of one shape, one is squashed."""
        keys = [set(o.label.trails) for o in pair if isinstance(o.label, Weight)]
        squashed = [{k for k in ks if "squashed" in trails[k].steps} for ks in keys]
        for i in (0, 1):
            if len(keys[i]) == 1 and squashed[i] and keys[1 - i] and not squashed[1 - i]:
                (key,) = keys[i]
                self.uses.kinds.setdefault(key, set()).add(Kind.SPREAD)
                trails.pop(key)

    def _use_arguments(self, arguments: Mapping[str, Kind], weights: list[_Operand], *kinds: Kind) -> None:
        for operand in weights:
            kind = arguments.get(operand.argument)
            if kind in kinds and isinstance(operand.label, Weight):
                self._use(operand.label, kind)

    # Parameters and activations.

    def _meet(
        self,
        name: str,
        operands: list[_Operand],
        weights: list[_Operand],
        data: list[_Operand],
        args: tuple[Any, ...],
        results: list[Tensor],
    ) -> Data:
        """Note how activations use the parameters of an operator, and label the result."""
        first = data[0].label
        assert isinstance(first, Data)
        raw = all(o.label.raw for o in data if isinstance(o.label, Data)) and not weights
        if name == "topk" and results:
            self._choose(first, data[0].tensor, args)
        if name in SUMS:
            self._sum(first, data[0].tensor, args)
        for key in first.scaled:
            if name in PERIODIC:
                self._retell(key, Kind.FREQUENCY)
            elif name in EXPONENTIALS:
                self._retell(key, Kind.RECURRENCE)
        if name in PRODUCTS:
            return self._multiply(name, weights, data)
        scaled: Mapping[Key, Scaled] = first.scaled if name in PASSING else {}
        if name in PASSING and name not in ("_to_copy", "clone", "alias", "detach"):
            scaled = {key: Scaled((), s.spreads) for key, s in scaled.items()}
        makers: frozenset[Key] = frozenset()
        if len(data) == 1 and not weights and (name in ACTIVATIONS or name in SCALING | SHIFTING):
            makers = first.makers
            scaled = scaled or {
                key: Scaled((), s.spreads) for key, s in first.scaled.items() if name in SCALING
            }
        for operand in weights:
            assert isinstance(operand.label, Weight)
            kept = self._use_operand(name, operand, data, results)
            if name in SHIFTING and operand.tensor.numel() <= data[0].tensor.numel():
                makers = first.makers
            scaled = {**scaled, **kept}
        if len(data) == 2 and name in SCALING:  # the scale of a modulated weight
            for operand in data:
                assert isinstance(operand.label, Data)
                scaled = {**scaled, **{k: s for k, s in operand.label.scaled.items() if s.spreads}}
        return Data(raw, makers, scaled)

    def _use_operand(
        self, name: str, operand: _Operand, data: list[_Operand], results: list[Tensor]
    ) -> dict[Key, Scaled]:
        weight = operand.label
        assert isinstance(weight, Weight)
        if any(trail.steps & _SIDES for trail in weight.trails.values()):
            self._settle(weight)
            return {}
        if name in SCALING:
            return self._scale(weight, operand.tensor, data[0].tensor, results)
        if name in SHIFTING:
            self._shift(weight, operand.tensor, data[0])
            return {}
        kind = ARGUMENTS.get(name, {}).get(operand.argument)
        if kind is Kind.TABLE and any(len(t.shape) > 2 for t in weight.trails.values()):
            return {key: Scaled((), True) for key in weight.trails}  # one of many matrices, or of many rows
        if kind is not None:
            self._use(weight, kind)
        elif name in PERIODIC:
            self._use(weight, Kind.FREQUENCY)
        return {}

    def _settle(self, weight: Weight) -> None:
        """A product of parameters met activations, and not as their map: learned rows went through a map."""
        self._use(weight, Kind.QUERY, lambda trail: "left" in trail.steps)
        self._use(weight, Kind.MAP, lambda trail: "right" in trail.steps)

    def _multiply(self, name: str, weights: list[_Operand], data: list[_Operand]) -> Data:
        left, right = PRODUCTS[name]
        kind = Kind.CONVOLUTION if name in CONVOLUTIONS else Kind.MAP
        makers: set[Key] = set()
        factors = [o for o in data if o.argument in (left, right) and isinstance(o.label, Data)]
        on_input = any(o.label.raw for o in factors if isinstance(o.label, Data))
        for operand in weights:
            label = operand.label
            assert isinstance(label, Weight)
            if operand.argument not in (left, right):
                self._use_arguments(ARGUMENTS.get(name, {}), [operand], Kind.BIAS)
                continue
            if not factors:
                continue
            if any({"left", "repeated"} <= trail.steps for trail in label.trails.values()):
                self._settle(label)
                continue
            self._use(label, kind, lambda trail: not trail.is_table)
            makers |= set(label.trails)
            if on_input:
                self.uses.inputs |= set(label.trails)
        for operand in factors:  # a weight that was scaled by activations on its way
            if operand.argument == right and isinstance(operand.label, Data):
                for key, scaled in operand.label.scaled.items():
                    if scaled.spreads:
                        self._retell(key, kind)
        return Data(False, frozenset(makers))

    def _scale(
        self, weight: Weight, tensor: Tensor, other: Tensor, results: list[Tensor]
    ) -> dict[Key, Scaled]:
        shape = tuple(results[0].shape)
        mine, theirs = _aligned(tensor, shape), _aligned(other, shape)
        spreads = sum(n > 1 for n in mine) > 1 and any(
            m > 1 and t == 1 for m, t in zip(mine, theirs, strict=True)
        )
        found: dict[Key, Scaled] = {}
        for key, trail in weight.trails.items():
            if "periodic" in trail.steps:
                self._retell(key, Kind.FREQUENCY)
            elif "squashed" in trail.steps:
                one = all(n == 1 for n in trail.shape)
                self._retell(key, Kind.TEMPERATURE if one else Kind.RECURRENCE)
            elif not spreads:
                self.uses.kinds.setdefault(key, set()).add(Kind.GAIN)
            found[key] = Scaled(mine, spreads)
        return found

    def _shift(self, weight: Weight, tensor: Tensor, other: _Operand) -> None:
        data = other.label
        assert isinstance(data, Data)
        rows = sum(n > 1 for n in tensor.shape) > 1
        for key, trail in weight.trails.items():
            if "periodic" in trail.steps:
                kind = Kind.FREQUENCY
            elif rows or ("picked" in trail.steps and not trail.is_vector):
                kind = Kind.POSITION
            else:
                kind = Kind.BIAS if data.makers else Kind.SHIFT
            self.uses.kinds.setdefault(key, set()).add(kind)

    def _sum(self, data: Data, tensor: Tensor, args: tuple[Any, ...]) -> None:
        dims = args[1] if len(args) > 1 and args[1] is not None else range(tensor.dim())
        dims = [dims] if isinstance(dims, int) else list(dims)
        for key, scaled in data.scaled.items():
            if len(scaled.shape) != tensor.dim() or not any(scaled.shape[dim] > 1 for dim in dims):
                continue
            if scaled.spreads:
                self._retell(key, Kind.MAP)
            elif sum(n > 1 for n in scaled.shape) > 1:
                self.uses.ambiguous.add(key)

    def _retell(self, key: Key, kind: Kind) -> None:
        """Replace the gain that a scale seemed to be by what it turned out to be."""
        kinds = self.uses.kinds.setdefault(key, set())
        kinds.discard(Kind.GAIN)
        kinds.add(kind)

    def _choose(self, data: Data, tensor: Tensor, args: tuple[Any, ...]) -> None:
        dim = args[2] if len(args) > 2 else -1
        if dim in (-1, tensor.dim() - 1):
            self.uses.routers |= data.makers


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


def _aligned(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(int(n) for n in tensor.shape)
    return (1,) * (len(shape) - len(own)) + own
