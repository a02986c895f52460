"""Where a dimension of a tensor goes in views and elementwise operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias"})


def moved(name: str, args: Sequence[Any], dim: int, old: Sequence[int], new: Sequence[int]) -> int | None:
    """Follow a dimension from an operator's first operand to its result.

    Args:
        name: The operator.
        args: Its positional arguments, the operand first.
        dim: The dimension, >= 0.
        old: The operand's shape.
        new: The result's shape.

    Returns:
        The dimension of the result, or None if it was merged, split or removed.
    """
    if name in _RESHAPES:
        before, size = math.prod(old[:dim]), old[dim]
        places = [i for i, n in enumerate(new) if n == size and math.prod(new[:i]) == before]
        return places[-1] if places else None
    if name == "t":
        return len(old) - 1 - dim
    if name == "transpose":
        first, second = (int(d) % len(old) for d in args[1:3])
        return {first: second, second: first}.get(dim, dim)
    if name == "permute":
        return [d % len(old) for d in args[1]].index(dim)
    if name == "unsqueeze":
        return dim + (dim >= int(args[1]) % len(new))
    if name in ("select", "unbind"):
        removed = int(args[1] if len(args) > 1 else 0) % len(old)
        return None if removed == dim else dim - (removed < dim)
    if name == "squeeze":
        if old[dim] == 1:
            return None
        return sum(n != 1 for n in new[: dim + 1]) if len(args) < 2 else dim - (len(old) - len(new))
    if name in ("as_strided", "unfold"):
        return None
    return dim + len(new) - len(old) if len(new) >= len(old) else None


def same_dim(dim: int | None, other: Any, rank: int) -> bool:
    """Whether a dimension is the one that an argument names."""
    return dim is not None and isinstance(other, int) and other % max(rank, 1) == dim
