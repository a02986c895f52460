"""Operators in which parameters and activations meet, or activations that come from parameters."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .dims import moved, same_dim
from .kinds import (
    ACTIVATIONS,
    ARGUMENTS,
    CHOICES,
    CONVOLUTIONS,
    EXPONENTIALS,
    NONLINEAR,
    PADDING,
    PASSING,
    PERIODIC,
    PICKING,
    PRODUCTS,
    SCALING,
    SHIFTING,
    SOFTMAX,
    SUMS,
    Kind,
)
from .labels import SIDES, Call, Data, Key, Operand, Product, Scaled, Uses, Weight

_COPIES = ("_to_copy", "clone", "alias", "detach")


def meet(call: Call, uses: Uses) -> Data:
    """Note how activations use the parameters of an operator, and label its result.

    Args:
        call: The operator; at least one operand is `Data`.
        uses: Mutated: what was seen is added.
    """
    _retell_scales(call, uses)
    _choose(call, uses)
    if call.name in PRODUCTS:
        return _multiply(call, uses)
    scaled, has_summand = _use_operands(call, uses)
    label = Data(_source(call), scaled=scaled)
    if call.name == "argmax":
        return replace(label, chosen=call.data[0][1].makers)
    if call.name in CHOICES:
        label = replace(label, chosen=frozenset[Key]().union(*(data.chosen for _, data in call.data)))
    if len(call.data) == 1:
        return _alone(call, label, uses, has_summand)
    return _together(call, label, uses)


def _source(call: Call) -> int | None:
    """Which input it still is: parameters have not touched it."""
    sources = [data.source for _, data in call.data]
    if call.weights or None in sources:
        return None
    return min(source for source in sources if source is not None)


def _retell_scales(call: Call, uses: Uses) -> None:
    """What was just scaled by a parameter tells by what comes next what the parameter is."""
    operand, first = call.data[0]
    if call.name in SUMS:
        _sum(first, operand.tensor, call, uses)
    for key in first.scaled:
        if call.name in PERIODIC:
            _tell(key, Kind.FREQUENCY, uses)
        elif call.name in EXPONENTIALS:
            _tell(key, Kind.RECURRENCE, uses)


def _tell(key: Key, kind: Kind, uses: Uses) -> None:
    """A scale turned out to be something else; it may have looked like a map of each feature too."""
    uses.retell(key, kind, Kind.FEATURE_MAP)
    uses.retell(key, kind)


def _use_operands(call: Call, uses: Uses) -> tuple[dict[Key, Scaled], bool]:
    """Note the uses of an operator's parameters; returns what scales its result, and if one was added."""
    first = call.data[0][1]
    scaled: dict[Key, Scaled] = {}
    if call.name in PASSING:
        scaled = {
            key: s if call.name in _COPIES else Scaled((), s.spreads) for key, s in first.scaled.items()
        }
    elif len(call.data) == 1 and not call.weights and call.name in SCALING:
        scaled = {key: Scaled((), s.spreads) for key, s in first.scaled.items()}
    has_summand = False
    for operand, weight in call.weights:
        if first.makers and weight.trails.keys() <= first.makers:
            continue  # the scale of a quantised weight, which has made the activations
        scaled |= _use_operand(call, operand, weight, uses)
        has_summand |= call.name in SHIFTING and operand.tensor.numel() <= call.data[0][0].tensor.numel()
    return scaled, has_summand


def _alone(call: Call, label: Data, uses: Uses, has_summand: bool) -> Data:
    """Label what becomes of one tensor of activations, with or without parameters."""
    operand, first = call.data[0]
    if call.name in NONLINEAR:
        uses.layers |= first.makers
    is_own = all(weight.trails.keys() <= first.makers for _, weight in call.weights)
    is_kept = is_own and call.name in ACTIVATIONS | SCALING | SHIFTING | PADDING
    if not (is_kept or has_summand):
        return label
    label = replace(label, makers=first.makers, chosen=first.chosen)
    if call.name in NONLINEAR:
        return label
    product = _moved(first.product, call, operand.tensor)
    if call.name in SOFTMAX:
        return replace(label, product=_shares(product, operand.tensor, call, uses))
    return replace(
        label,
        is_linear=first.is_linear,
        compared=first.compared,
        is_scores=first.is_scores,
        parts=first.parts,
        product=product,
    )


def _moved(product: Product | None, call: Call, before: Tensor) -> Product | None:
    """Follow the dimension that a map gave its result."""
    if product is None or product.dim is None or not call.results:
        return product
    old, new = tuple(before.shape), tuple(call.results[0].shape)
    dim = moved(call.name, call.args, product.dim, old, new)
    if dim is None:
        is_taken = call.name in ("select", "unbind")
        return replace(product, dim=None) if is_taken else None
    return replace(product, dim=dim if new[dim] == product.size else None)


def _shares(product: Product | None, tensor: Tensor, call: Call, uses: Uses) -> Product | None:
    """Softmax over a map's results makes shares of them; over what the map was compared with, attention."""
    if product is None or product.dim is None:
        return None
    if same_dim(product.dim, call.args[1] if len(call.args) > 1 else -1, tensor.dim()):
        return replace(product, is_shares=True)
    for key in product.keys & call.data[0][1].compared:
        uses.retell(key, Kind.QUERY, Kind.MAP)
    return None


def _together(call: Call, label: Data, uses: Uses) -> Data:
    """Label what becomes of several tensors of activations."""
    labels = [data for _, data in call.data]
    if call.name in SCALING:  # the scale of a modulated weight
        spreading = {k: s for data in labels for k, s in data.scaled.items() if s.spreads}
        label = replace(label, scaled={**spreading, **label.scaled})
        _weigh(call, uses)
    if call.name in SHIFTING and len(labels) == 2:
        for scores, other in (labels, reversed(labels)):
            if scores.is_scores:
                for key in other.compared:
                    uses.retell(key, Kind.POSITION, Kind.MAP)
        label = replace(label, is_scores=any(data.is_scores for data in labels))
    if call.name in ("stack", "cat") and len({data.makers for data in labels}) == len(labels):
        label = replace(label, parts=len(labels) if all(data.makers for data in labels) else 1)
    return label


def _weigh(call: Call, uses: Uses) -> None:
    """Shares of one map times the results of several others: experts are weighed."""
    pairs = [data for _, data in call.data[:2]]
    for (_, data), other in zip(call.data[:2], reversed(pairs), strict=True):
        product = data.product
        if product is None or not product.is_shares or product.size < 2:
            continue
        taken = product.dim is None and other.makers and not other.makers & product.keys
        if taken or other.parts == product.size:
            uses.routers |= product.keys


def _choose(call: Call, uses: Uses) -> None:
    """A map from whose results the largest are chosen is a router once the choice picks activations."""
    operand, first = call.data[0]
    if call.name == "topk":
        dim = call.args[2] if len(call.args) > 2 else -1
        if dim in (-1, operand.tensor.dim() - 1):
            uses.routers |= first.makers
    chosen = frozenset[Key]().union(*(data.chosen for _, data in call.data))
    if not chosen or call.name not in PICKING | SCALING | PRODUCTS.keys():
        return
    is_from_matrices = any(sum(n > 1 for n in o.tensor.shape) > 2 for o, _ in call.weights)
    if is_from_matrices or not all(data.chosen for _, data in call.data):
        uses.routers |= chosen


def _use_operand(call: Call, operand: Operand, weight: Weight, uses: Uses) -> dict[Key, Scaled]:
    other, data = call.data[0]
    if any(trail.steps & SIDES for trail in weight.trails.values()):
        _settle(weight, uses)
        return {}
    if call.name in SCALING:
        return _scale(weight, operand.tensor, other.tensor, tuple(call.results[0].shape), uses)
    if call.name in SHIFTING:
        _shift(weight, operand.tensor, data, uses)
        return {}
    kind = ARGUMENTS.get(call.name, {}).get(operand.argument)
    if kind is Kind.TABLE and any(len(t.shape) > 2 for t in weight.trails.values()):
        return {key: Scaled((), True) for key in weight.trails}  # one of many matrices, or of many rows
    if kind is not None:
        uses.add(weight, kind)
    elif call.name in PERIODIC:
        uses.add(weight, Kind.FREQUENCY)
    return {}


def _settle(weight: Weight, uses: Uses) -> None:
    """A product of parameters met activations, and not as their map: learned rows went through a map."""
    uses.add(weight, Kind.QUERY, lambda trail: "left" in trail.steps)
    uses.add(weight, Kind.MAP, lambda trail: "right" in trail.steps)


def _multiply(call: Call, uses: Uses) -> Data:
    """Note a product of activations with parameters, or with activations."""
    left, right = PRODUCTS[call.name]
    kind = Kind.CONVOLUTION if call.name in CONVOLUTIONS else Kind.MAP
    factors = [(o, data) for o, data in call.data if o.argument in (left, right)]
    makers: set[Key] = set()
    rows: set[Key] = set()
    parts, dim = 1, None
    for operand, weight in call.weights:
        if operand.argument not in (left, right):
            uses.add_arguments(call, ARGUMENTS.get(call.name, {}), Kind.BIAS)
            continue
        if not factors:
            continue
        if any({"left", "repeated"} <= trail.steps for trail in weight.trails.values()):
            _settle(weight, uses)
            continue
        uses.add(weight, kind, lambda trail: not trail.is_table)
        makers |= set(weight.trails)
        for _, data in factors:
            if data.source is not None:
                uses.inputs.setdefault(data.source, set()).update(weight.trails)
        dim = _dim_of_factor(call, operand.argument == left)
        parts = max(trail.shape[0] if len(trail.shape) > 2 else 1 for trail in weight.trails.values())
        rows |= {key for key, trail in weight.trails.items() if not trail.is_vector}
    for operand, data in factors:  # a weight that was scaled by activations on its way
        if operand.argument == right:
            for key, scaled in data.scaled.items():
                if scaled.spreads:
                    _tell(key, kind, uses)
    if not makers:
        _weigh(call, uses)
        return Data(is_scores=len(factors) == 2)
    if any(operand.argument not in (left, right) for operand, _ in call.weights):
        uses.layers |= makers
    keys = frozenset(makers)
    product = None if dim is None else Product(keys, dim, call.results[0].shape[dim])
    is_compared = any(data.is_linear and not data.makers & keys for _, data in factors)
    return Data(
        makers=keys,
        is_linear=True,
        product=product,
        compared=frozenset(rows) if is_compared else frozenset(),
        parts=parts,
    )


def _dim_of_factor(call: Call, is_left: bool) -> int | None:
    """The dimension of a matrix product that its left or right factor gives it."""
    rank = call.results[0].dim()
    if call.name in CONVOLUTIONS:
        return 1
    if call.name in ("mv", "dot", "vdot", "addmv"):
        return 0 if is_left and rank else None
    return rank - 2 if is_left else rank - 1


def _scale(
    weight: Weight, tensor: Tensor, other: Tensor, shape: tuple[int, ...], uses: Uses
) -> dict[Key, Scaled]:
    mine, theirs = _aligned(tensor, shape), _aligned(other, shape)
    pairs = list(zip(mine, theirs, strict=True))
    spreads = sum(n > 1 for n in mine) > 1 and any(m > 1 and t == 1 for m, t in pairs)
    # Each feature, a number, is multiplied by a vector of its own.
    per_feature = spreads and mine[-1] > 1 and theirs[-1] == 1 and any(m > 1 and t > 1 for m, t in pairs)
    found: dict[Key, Scaled] = {}
    for key, trail in weight.trails.items():
        if "periodic" in trail.steps:
            _tell(key, Kind.FREQUENCY, uses)
        elif "squashed" in trail.steps:
            one = all(n == 1 for n in trail.shape)
            _tell(key, Kind.TEMPERATURE if one else Kind.RECURRENCE, uses)
        elif not spreads:
            uses.kinds.setdefault(key, set()).add(Kind.GAIN)
        elif per_feature:
            uses.kinds.setdefault(key, set()).add(Kind.FEATURE_MAP)
        found[key] = Scaled(mine, spreads)
    return found


def _shift(weight: Weight, tensor: Tensor, data: Data, uses: Uses) -> None:
    rows = sum(n > 1 for n in tensor.shape) > 1
    for key, trail in weight.trails.items():
        if "periodic" in trail.steps:
            kind = Kind.FREQUENCY
        elif rows or ("picked" in trail.steps and not trail.is_vector):
            kind = Kind.POSITION
        else:
            kind = Kind.BIAS if data.makers else Kind.SHIFT
            uses.layers |= data.makers
        uses.kinds.setdefault(key, set()).add(kind)


def _sum(data: Data, tensor: Tensor, call: Call, uses: Uses) -> None:
    """A scale that is summed over is a factor of a product."""
    args = call.args
    dims = args[1] if len(args) > 1 and args[1] is not None else range(tensor.dim())
    dims = [dims] if isinstance(dims, int) else list(dims)
    for key, scaled in data.scaled.items():
        if len(scaled.shape) != tensor.dim() or not any(scaled.shape[dim] > 1 for dim in dims):
            continue
        if scaled.spreads:
            _tell(key, Kind.MAP, uses)
        elif sum(n > 1 for n in scaled.shape) > 1:
            uses.ambiguous.add(key)


def _aligned(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(int(n) for n in tensor.shape)
    return (1,) * (len(shape) - len(own)) + own
