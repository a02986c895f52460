"""The ends of a model and its routers, known by what the model says and by where a map hangs.

They are maps like others, and decay as those do. Optimizers other than AdamW, and schemes that scale learning
rates with width, treat them differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from .findings import Finding
from .layers import block_of
from .places import Located, Place, class_of, unwrap, words
from .roles import Role

_REFINED = frozenset({Role.MATRIX, Role.CONVOLUTION})
# Attributes of a model, or of its head, that hold the last map; and those that hold the first.
_OUTPUTS = frozenset({"lm_head", "head", "classifier", "score", "fc", "logits", "to_logits", "unembed"})
_OUTPUTS |= {"output_projection", "embed_out", "proj_out", "output_layer", "qa_outputs", "lm_loss"}
_INPUTS = frozenset({"x_embedder", "conv_in", "conv_stem", "img_in", "patch_embed", "patch_embedding"})
_INPUTS |= {"patch_embeddings", "patchify", "input_embedding", "input_projection"}
_WHOLE = 4  # maps that make a model
_TABLES = frozenset({Role.EMBEDDING, Role.TIED_EMBEDDING})  # a map after one of them reads no data
_ROUTERS = frozenset({"router", "gate", "wg"})


def with_ends(
    model: nn.Module, located: Sequence[Located], findings: Mapping[int, Finding]
) -> dict[int, Finding]:
    """Make `OUTPUT`, `INPUT` and `ROUTER` of the matrices and convolutions that are.

    Args:
        model: The model, wrapped or not.
        located: Its tensors.
        findings: What was found for each, by `id` of its `Located`.

    Returns:
        The findings; the role that was refined is their `base`.
    """
    told = {id(tensor) for tensor in _told_outputs(unwrap(model))}
    result = dict(findings)

    def refine(item: Located, role: Role | None) -> None:
        found = result[id(item)]
        if role is not None and found.role in _REFINED:
            result[id(item)] = replace(found, role=role, base=found.role)

    for item in located:
        refine(item, Role.OUTPUT if id(item.param) in told else _role_by_place(item))
    maps = [item for item in located if result[id(item)].role in _REFINED]
    known = {found.role for found in result.values()}
    if len(maps) < _WHOLE:  # a layer or a block, whose ends are not those of a model
        return result
    if Role.INPUT not in known and (first := _first_map(located, result)) is not None:
        refine(first, Role.INPUT)
    if not known & {Role.OUTPUT, Role.TIED_EMBEDDING} and _ends_the_model(maps[-1]):
        refine(maps[-1], Role.OUTPUT)
    return result


def _first_map(located: Sequence[Located], findings: Mapping[int, Finding]) -> Located | None:
    """The first map that is registered, if no table comes before it and no stack of blocks holds it."""
    for item in located:
        role = findings[id(item)].role
        if role in _TABLES:
            return None
        if role in _REFINED:
            return None if _is_one_of_many(item.places[0]) else item
    return None


def _ends_the_model(item: Located) -> bool:
    """Whether the last map that is registered is an output: no part of a stack of blocks, and no pooler."""
    place = item.places[0]
    is_pooled = any(word.startswith("pool") for word in words(place.owner_name.replace(".", "_")))
    return not (_is_one_of_many(place) or is_pooled)


def _is_one_of_many(place: Place) -> bool:
    """Whether a tensor hangs in a stack of blocks, or in a list of layers, which has no order."""
    return block_of(place) is not None or any(isinstance(m, nn.ModuleList) for _, m in place.ancestors[-2:-1])


def _told_outputs(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of what the model itself calls its output (transformers) or classifier (timm)."""
    for method in ("get_output_embeddings", "get_classifier"):
        if not callable(getattr(type(model), method, None)):
            continue
        try:
            heads = getattr(model, method)()
        except Exception:  # a model without a head may refuse to answer
            continue
        if isinstance(heads, (nn.ModuleList, nn.ModuleDict)):
            heads = list(heads.children())
        for head in heads if isinstance(heads, (tuple, list)) else (heads,):
            if isinstance(head, nn.Module):
                yield from [param for param in head.parameters() if param.dim() > 1][-1:]


def _role_by_place(item: Located) -> Role | None:
    place = item.places[0]
    path = place.owner_name.split(".") if place.owner_name else [place.local]
    if path[-1] in _ROUTERS and _is_beside_experts(place):
        return Role.ROUTER
    if path[0] in _OUTPUTS and (len(path) == 1 or (len(path) == 2 and path[1] in _OUTPUTS)):
        return Role.OUTPUT
    if _reads_channels(item, place.owner):
        return Role.INPUT
    if any(part in _INPUTS for part in path[-2:]) and not any(part.isdigit() for part in path[:-2]):
        return Role.INPUT
    return None


def _reads_channels(item: Located, owner: nn.Module) -> bool:
    """Whether a convolution reads the three channels of an image or the one of a waveform."""
    groups, is_transposed = getattr(owner, "groups", 1), getattr(owner, "transposed", False)
    if len(item.shape) < 3 or groups != 1 or is_transposed:
        return False
    return item.shape[1] == 3 or (item.shape[1] == 1 and item.shape[0] >= 8)


def _is_beside_experts(place: Place) -> bool:
    depth = place.owner_name.count(".") + 1 if place.owner_name else 0
    parent = place.ancestors[max(depth - 1, 0)][1]
    return any(
        "experts" in words(key) or "experts" in words(class_of(m).__name__)
        for key, m in parent.named_children()
    )
