"""Operators on parameters alone: what is made of them, and what that says."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .kinds import ARGUMENTS, CONVOLUTIONS, PRODUCTS, SCALING, SHIFTING, STEPS, Kind
from .labels import Call, Key, Operand, Trail, Uses, Weight


def combine(call: Call, uses: Uses) -> Weight | None:
    """Label what an operator makes of parameters alone.

    Args:
        call: The operator; at least one operand is a `Weight`, none is `Data`.
        uses: Mutated: gains, biases and spreads are noted.

    Returns:
        The label of its results, or None.
    """
    labels = {operand.argument: weight for operand, weight in call.weights}
    arguments = ARGUMENTS.get(call.name, {})
    if call.name in PRODUCTS:
        uses.add_arguments(call, arguments, Kind.BIAS, Kind.SHIFT)
        left, right = (labels.get(argument) for argument in PRODUCTS[call.name])
        if call.name in CONVOLUTIONS and right is not None:
            uses.add(right, Kind.CONVOLUTION)
            return left
        if left is None or right is None:  # multiplied with a constant: a map, rows, who knows
            return None
        return Weight({**right.after("right").trails, **left.after("left").trails})
    if call.name.endswith("norm") and "weight" in arguments:
        uses.add_arguments(call, arguments, Kind.GAIN, Kind.SHIFT)
        return labels.get("input")
    label = _elementwise(call.name, call.weights, call.results, uses)
    return label.after(STEPS[call.name]) if call.name in STEPS else label


def _elementwise(
    name: str, weights: list[tuple[Operand, Weight]], results: Sequence[Tensor], uses: Uses
) -> Weight:
    """Merge parameters: those as large as the result make it up, smaller ones scale or shift it."""
    size = max((t.numel() for t in results), default=0)
    large = [weight for operand, weight in weights if operand.tensor.numel() >= size]
    large = large or [weight for _, weight in weights]
    trails: dict[Key, Trail] = {}
    for weight in large:
        for key, trail in weight.trails.items():
            known = trails.get(key, trail)
            trails[key] = Trail(trail.shape, known.steps | trail.steps)
    for _, weight in weights:
        if weight not in large and name in SCALING and not weight.trails.keys() & trails.keys():
            uses.add(weight, Kind.GAIN)
    if name in SHIFTING and len(large) == 2:
        _find_spread(large, trails, uses)
    return Weight(trails)


def _find_spread(pair: list[Weight], trails: dict[Key, Trail], uses: Uses) -> None:
    """`mean + softplus(rho) * noise`: of two summands of one shape, one is squashed."""
    keys = [set(weight.trails) for weight in pair]
    squashed = [{k for k in ks if "squashed" in trails[k].steps} for ks in keys]
    for i in (0, 1):
        if len(keys[i]) == 1 and squashed[i] and keys[1 - i] and not squashed[1 - i]:
            (key,) = keys[i]
            uses.kinds.setdefault(key, set()).add(Kind.SPREAD)
            trails.pop(key)
