"""From decisions to the groups that optimizers take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .decide import Decision, Options, decide
from .lint import warn
from .overrides import Overrides, Setting
from .places import tensors_of
from .policies import Policy, get_policy
from .roles import Role
from .scaling import WidthScale
from .walk import walk


def build_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    policy: str | Policy = "hygiene",
    roles: Mapping[Role | str, Setting] | None = None,
    overrides: Overrides | None = None,
    layer_decay: float | None = None,
    lr: float | Tensor | None = None,
    example_inputs: Any = None,
    lr_by_role: Mapping[Role | str, float] | str | None = None,
    width: WidthScale | None = None,
) -> list[dict[str, Any]]:
    """Build parameter groups in which the right parameters decay.

    Each tensor is decided once, by the strongest evidence: an override, a mark its author left, the type of
    the module that owns it, that module's structure, what a forward pass does with the tensor, its local
    name, its shape. What nothing recognises
    decays, and a warning names it.

    Args:
        model: Any module; `torch.compile`, DDP, FSDP2 and checkpoint wrappers change nothing.
        weight_decay: Decay of the parameters that decay.
        policy: `"hygiene"`, `"recipe"`, or another tool's rule: `"huggingface"`, `"timm"`, `"nanogpt"`,
            `"megatron"`, `"all"`.
        roles: Knobs for whole roles, e.g. `{"embedding": True}` lets token embeddings decay. Values as in
            `overrides`.
        overrides: Selector -> setting. A selector is a glob over names, a compiled regular expression, a
            module type or instance, or a predicate `(name, tensor) -> bool`; a setting is a bool, a weight
            decay, or a mapping of options (`weight_decay`, `weight_decay_scale`, `lr`, `lr_scale`, any group
            option).
        layer_decay: Factor on the learning rate per layer below the top, e.g. 0.75.
        lr: The base learning rate that `layer_decay`, `lr_by_role`, `width` and `lr_scale` scale.
        example_inputs: What to call the model with: a tensor, a tuple or list of positional arguments, or a
            mapping of keyword arguments. One forward pass of a copy is watched, without arithmetic where the
            model allows, to see how each parameter is used. If it fails, a warning says so.
        lr_by_role: Factors on `lr` by role, e.g. `{"embedding": 0.2}`, or the name of a published recipe:
            `"nanochat"`, which sets `lr`, `betas` and `eps` of embeddings and outputs.
        width: How wide the model is against the one that `lr` was tuned on: `WidthScale(base=...)`.

    Returns:
        Groups with `params`, `param_names` (canonical: wrapper components dropped) and `weight_decay`, decay
        groups first (with `policy="timm"` last, as in timm's checkpoints), none empty. `lr` is there when
        learning rates are scaled, any other key only when an override sets it. Frozen parameters are absent,
        tied ones appear once.

    Raises:
        TypeError: If `model` is not a module, a trainable parameter is not floating point, or an argument has
            the wrong type.
        ValueError: If nothing is trainable, a parameter is an FSDP `FlatParameter`, an override matches
            nothing, or an argument is out of range.

    Examples:
        >>> groups = build_param_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 0.1)
        >>> [(group["weight_decay"], group["param_names"]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
    """
    options = Options(
        weight_decay, policy, roles, overrides, layer_decay, lr, example_inputs, lr_by_role, width
    )
    return decided_groups(decide(model, options), options)


def get_optimizer_grouped_parameters(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The BERT and GPT recipe: exactly two groups, and only biases and norms are exempt.

    Embeddings decay, learned positions too. Norms are found by the type and structure of their module, not
    by name, so `ln_f` and `bn1` are exempt and a linear layer inside a module called `norm` is not.

    Args:
        model: Any module, wrapped or not.
        weight_decay: Decay of the first group; the second has 0.

    Returns:
        `[decay, no_decay]`, each with `params`, `param_names` and `weight_decay`. Either may be empty.

    Raises:
        TypeError: As `build_param_groups`.
        ValueError: As `build_param_groups`.
    """
    decisions = decide(model, Options(weight_decay, "recipe"))
    return [
        {
            "params": [d.param for d in decisions if d.decays is decays],
            "param_names": [d.name for d in decisions if d.decays is decays],
            "weight_decay": float(weight_decay) if decays else 0.0,
        }
        for decays in (True, False)
    ]


def new_param_groups(
    model: nn.Module,
    param_groups: Iterable[Mapping[str, Any]],
    weight_decay: float = 0.01,
    *,
    policy: str | Policy = "hygiene",
    roles: Mapping[Role | str, Setting] | None = None,
    overrides: Overrides | None = None,
    layer_decay: float | None = None,
    lr: float | Tensor | None = None,
    example_inputs: Any = None,
    lr_by_role: Mapping[Role | str, float] | str | None = None,
    width: WidthScale | None = None,
) -> list[dict[str, Any]]:
    """Groups for parameters that became trainable after the optimizer was built.

    Args:
        model: The model.
        param_groups: The optimizer's groups. Membership is by identity, never by value.
        weight_decay: As for `build_param_groups`, like all that follow.
        policy: As above.
        roles: As above.
        overrides: As above.
        layer_decay: As above.
        lr: As above.
        example_inputs: As above.
        lr_by_role: As above.
        width: As above.

    Returns:
        Groups for the trainable parameters that are in no group yet, ready for `add_param_group`; an empty
        list if there are none.

    Raises:
        TypeError: As `build_param_groups`.
        ValueError: As `build_param_groups`, but a model with nothing to train gives an empty list.
    """
    options = Options(
        weight_decay, policy, roles, overrides, layer_decay, lr, example_inputs, lr_by_role, width
    )
    known = {id(param) for group in param_groups for param in tensors_of(group)}
    decisions = [d for d in decide(model, options, allow_none=True) if id(d.param) not in known]
    return decided_groups(decisions, options)


def decided_groups(decisions: Sequence[Decision], options: Options) -> list[dict[str, Any]]:
    """The groups of decisions that were made with these options; warns of what deserves a look."""
    groups = group_decisions(decisions, options.lr, get_policy(options.policy).exempt_first)
    warn(decisions, groups, options)
    return groups


def group_decisions(
    decisions: Iterable[Decision], lr: float | Tensor | None, exempt_first: bool = False
) -> list[dict[str, Any]]:
    """Merge equal options into as few groups as possible.

    Args:
        decisions: One per tensor.
        lr: Base learning rate; written, scaled, to every group as soon as one tensor's is scaled.
        exempt_first: Whether the groups without decay come first.

    Returns:
        The groups, in two blocks by whether they decay, otherwise in order of first appearance. A decision
        not to decay keeps its own group even when the weight decay is 0, so the shape of a checkpoint does
        not depend on that number.
    """
    decisions = list(decisions)
    scaled = any(d.lr_scale != 1 for d in decisions)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for d in sorted(decisions, key=lambda d: d.decays is exempt_first):  # stable
        extra = {key: value for key, value in d.options.items() if key != "weight_decay"}
        # Kernels over lists of DTensors want one device mesh per group.
        mesh = getattr(d.param, "device_mesh", None)
        key = (d.decays, d.options["weight_decay"], d.lr_scale, mesh, *_hashable(extra))
        group = groups.get(key)
        if group is None:
            group = {"params": [], "param_names": [], "weight_decay": d.options["weight_decay"], **extra}
            if scaled and lr is not None:
                group.setdefault("lr", lr * d.lr_scale)
            groups[key] = group
        group["params"].append(d.param)
        group["param_names"].append(d.name)
    return list(groups.values())


def summarize_param_groups(groups: Iterable[Mapping[str, Any]], model: nn.Module | None = None) -> str:
    """Count what decays: `"decay: 48 params, no_decay: 100 params"`.

    Args:
        groups: Parameter groups of any origin; without `weight_decay` a group counts as decaying.
        model: The model; its frozen parameters that are in no group are counted too, with what to do when
            they are unfrozen.

    Returns:
        One line, without prefix or newline.
    """
    groups = list(groups)
    counts = {True: 0, False: 0}
    for group in groups:
        counts[group.get("weight_decay", 1.0) > 0] += len(tensors_of(group))
    line = f"decay: {counts[True]} params, no_decay: {counts[False]} params"
    grouped = {id(p) for group in groups for p in tensors_of(group)}
    located = [] if model is None else walk(model)
    frozen = [item for item in located if not item.param.requires_grad and id(item.param) not in grouped]
    if not frozen:
        return line
    return (
        f"{line}; {len(frozen)} frozen params are in no group: once unfrozen, add what "
        "fused_adamw.groups.new_param_groups returns"
    )


def _hashable(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for key in sorted(options):
        value = options[key]
        value = tuple(value) if isinstance(value, list) else value
        try:
            hash(value)
        except TypeError:
            value = repr(value)
        pairs.append((key, value))
    return pairs
