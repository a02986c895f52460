"""Layer-wise learning-rate decay: how deep each parameter sits.

A model with timm's `group_matcher()` decides for itself. Any other model gets BEiT's rule: embeddings,
positions and everything before the first block are layer 0, block i is layer i + 1, what follows the last
block is the layer after it. Blocks are the children of the outermost repeated containers.
Sources: `timm/models/_manipulate.py: group_with_matcher`, `unilm/beit/optim_factory.py:
get_num_layer_for_vit`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .places import Located, Place, class_of, unwrap
from .roles import Role

_MATCH_PREVIOUS = 99999  # timm: "belongs to the group before"
_BOTTOM = frozenset({Role.EMBEDDING, Role.TIED_EMBEDDING, Role.POSITION, Role.TOKEN})


def layer_depths(model: nn.Module, located: Sequence[Located], roles: Mapping[str, Role]) -> dict[str, int]:
    """Number the layers of a model, 0 for the deepest below the loss.

    Args:
        model: The model, wrapped or not.
        located: Every tensor of it, frozen ones included.
        roles: Role of each tensor, by canonical name.

    Returns:
        Canonical name -> layer. The largest layer keeps the full learning rate.

    Raises:
        ValueError: If the model has neither a `group_matcher` nor repeated blocks.
    """
    matcher = getattr(unwrap(model), "group_matcher", None)
    if callable(matcher):
        return _by_matcher([item.name for item in located], matcher(coarse=False))
    return _by_blocks(located, roles)


def _by_matcher(names: Sequence[str], matcher: Any) -> dict[str, int]:
    ordinal = matcher if callable(matcher) else _ordinal_from_patterns(matcher)
    keys: dict[str, tuple[float, ...]] = {}
    for name in names:
        key = ordinal(name)
        keys[name] = tuple(key) if isinstance(key, Iterable) else (key,)
    layer, layer_of = -1, {}
    for key in sorted(set(keys.values())):
        if layer < 0 or key[-1] != _MATCH_PREVIOUS:
            layer += 1
        layer_of[key] = layer
    return {name: layer_of[key] for name, key in keys.items()}


def _ordinal_from_patterns(spec: Mapping[str, Any]) -> Callable[[str], tuple[float, ...]]:
    """`{group: regex}` or `{group: [(regex, suffix), ...]}`; the numbers that a regex captures are sorted."""
    compiled: list[tuple[re.Pattern[str], int, tuple[float, ...]]] = []
    for group, patterns in enumerate(spec.values()):
        if patterns is None:
            continue
        for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
            compiled.append((re.compile(pattern), group, tuple(suffix or ())))

    def ordinal(name: str) -> tuple[float, ...]:
        for pattern, group, suffix in compiled:
            match = pattern.match(name)
            if match:
                return (float(group), *(float(number) for number in match.groups() if number), *suffix)
        return (float("inf"),)  # heads and necks: the last layer

    return ordinal


def _by_blocks(located: Sequence[Located], roles: Mapping[str, Role]) -> dict[str, int]:
    depth_of_block: dict[int, int] = {}
    depths: dict[str, int] = {}
    after: list[str] = []  # since the last block
    for item in located:
        block = block_of(item.places[0])
        if block is not None:
            depths[item.name] = depth_of_block.setdefault(id(block), len(depth_of_block) + 1)
            after.clear()
        elif roles.get(item.name) in _BOTTOM:
            depths[item.name] = 0
        else:
            depths[item.name] = len(depth_of_block)
            after.append(item.name)
    if not depth_of_block:
        raise ValueError(
            "layer_decay needs layers: expected a model with a group_matcher() or a ModuleList or Sequential "
            f"of repeated blocks, got {type(located[0].places[0].ancestors[0][1]).__name__}"
        )
    return depths | dict.fromkeys(after, len(depth_of_block) + 1)


def block_of(place: Place) -> nn.Module | None:
    """The outermost ancestor that is one of several like modules in a list, and not a leaf itself."""
    for (_, parent), (_, child) in zip(place.ancestors, place.ancestors[1:], strict=False):
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and any(True for _ in child.children()):
            siblings = [m for m in parent.children() if any(True for _ in m.parameters())]
            if len(siblings) > 1 and len({class_of(unwrap(sibling)) for sibling in siblings}) == 1:
                return child
    return None
