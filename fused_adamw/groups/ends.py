"""The ends of a model and its routers, known by what the model says and by where a map hangs.

They are maps like others, and decay as those do. Optimizers other than AdamW, and schemes that scale learning
rates with width, treat them differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from .findings import Finding
from .places import Located, Place, class_of, unwrap, words
from .roles import Role

_REFINED = frozenset({Role.MATRIX, Role.CONVOLUTION})
# Attributes of a model, or of its head, that hold the last map; and those that hold the first.
_OUTPUTS = frozenset({"lm_head", "head", "classifier", "score", "fc", "logits", "to_logits", "unembed"})
_OUTPUTS |= {"output_projection", "embed_out", "proj_out", "output_layer", "qa_outputs", "lm_loss"}
_INPUTS = frozenset({"x_embedder", "conv_in", "conv_stem", "img_in", "patch_embed", "patch_embedding"})
_INPUTS |= {"patch_embeddings", "patchify", "input_embedding", "input_projection"}
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
    for item in located:
        found = findings[id(item)]
        if found.role not in _REFINED:
            continue
        role = Role.OUTPUT if id(item.param) in told else _role_by_place(item)
        if role is not None:
            result[id(item)] = replace(found, role=role, base=found.role)
    return result


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
    if any(part in _INPUTS for part in path[-2:]) and not any(part.isdigit() for part in path[:-2]):
        return Role.INPUT
    return None


def _is_beside_experts(place: Place) -> bool:
    depth = place.owner_name.count(".") + 1 if place.owner_name else 0
    parent = place.ancestors[max(depth - 1, 0)][1]
    return any(
        "experts" in words(key) or "experts" in words(class_of(m).__name__)
        for key, m in parent.named_children()
    )
