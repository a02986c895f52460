"""Says whose groups a checkpoint has that does not fit, and which call loads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..groups import POLICIES, build_param_groups

_BY_NAME = "optimizer.load_state_dict_by_name(state_dict{})"
_POLICIES = ("all", "nanogpt", "huggingface", "timm")  # the likely ones first


class _Source(NamedTuple):
    """Groups that the saved optimizer may have had."""

    groups: list[list[Tensor]]
    whose: str
    params: str  # the optimizer's first argument for such groups
    names: str  # what tells load_state_dict_by_name of them


def explain_mismatch(
    saved: Mapping[str, Any], live: Sequence[Mapping[str, Any]], model: nn.Module | None
) -> str:
    """Describe the groups of a checkpoint and of an optimizer, and how to load the one into the other.

    Args:
        saved: The saved `state_dict`.
        live: The optimizer's `param_groups`.
        model: The model they were built from, if it is known.

    Returns:
        Sentences. Of the sources that are tried, those are named whose groups have the sizes of the
        checkpoint's and whose parameters have the shapes of its moments.
    """
    groups = saved["param_groups"]
    text = f"The checkpoint has {_described(groups)}; the optimizer has {_described(live)}."
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return f"{text} To take its state over by name: {_BY_NAME.format('')}."
    sources = _distinct([s for s in _sources(model) if _fits(s.groups, saved)]) if model is not None else []
    if not sources:
        return (
            f"{text} To take its state over by name, tell which parameters these are, in the order of the "
            f"checkpoint: {_BY_NAME.format(', names)')[:-1]}, where names are model.named_parameters() for "
            "torch.optim.AdamW(model.parameters()), or groups as of build_param_groups(model, policy=...)."
        )
    may_be = "are" if len(sources) == 1 else "may be"
    for source in sources:
        text += (
            f" Its groups {may_be} those of {source.whose}: {_BY_NAME.format(', ' + source.names)} takes its "
            "state over into the optimizer's groups"
        )
        if all(group["params"] for group in groups):
            text += f"; FusedHygieneAdamW({source.params}, ...) loads it as it is, weight decay included"
        text += "."
    return text


def _described(groups: Sequence[Mapping[str, Any]]) -> str:
    """`2 groups, of 50 parameters (weight_decay=0.1) and 98 (0)`."""
    what = (" parameters (weight_decay=", *[" ("] * 3)
    sizes = [f"{len(g['params'])}{w}{g.get('weight_decay')})" for g, w in zip(groups, what, strict=False)]
    more = ", ..." if len(groups) > len(sizes) else ""
    return f"{len(groups)} group{'s' * (len(groups) != 1)}, of {', '.join(sizes)}{more}"


def _sources(model: nn.Module) -> Iterator[_Source]:
    """What a model's optimizer is usually built from."""
    params: list[Tensor] = list(model.parameters())
    given = "model.parameters()"
    yield _Source([params], f"torch.optim.AdamW({given})", given, "model.named_parameters()")
    for policy in dict.fromkeys((*_POLICIES, *POLICIES)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                groups = build_param_groups(model, policy=policy)
        except (TypeError, ValueError):  # the model's hooks, say, have changed since
            continue
        text = f'build_param_groups(model, policy="{policy}")'
        yield _Source([group["params"] for group in groups], f"policy {policy!r}", text, text)


def _fits(groups: Sequence[Sequence[Tensor]], saved: Mapping[str, Any]) -> bool:
    """Whether groups have the sizes of the saved ones, empty ones aside, and the shapes of saved moments."""
    mine = [group for group in saved["param_groups"] if group["params"]]
    if [len(group["params"]) for group in mine] != [len(group) for group in groups]:
        return False
    ids = [i for group in mine for i in group["params"]]
    params = [p for group in groups for p in group]
    moments = [saved["state"].get(i, {}).get("exp_avg") for i in ids]
    return all(m is None or m.shape == p.shape for m, p in zip(moments, params, strict=True))


def _distinct(sources: Sequence[_Source]) -> list[_Source]:
    """Without those that list the same parameters in the same order as an earlier one."""
    found: dict[tuple[tuple[int, ...], ...], _Source] = {}
    for source in sources:
        found.setdefault(tuple(tuple(map(id, group)) for group in source.groups), source)
    return list(found.values())
