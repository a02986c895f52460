"""One decision per tensor, in one pass: role, policy, marks, overrides, scales.

Precedence, strongest first: overrides (later ones win), marks and hooks, `roles=`, the policy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .ends import with_ends
from .findings import Confidence, Finding, Rule
from .identify import identify
from .marks import Marks, call_hook
from .overrides import (
    Override,
    Overrides,
    ParamGroupWarning,
    Setting,
    as_number,
    parse_overrides,
    parse_setting,
)
from .places import Located, class_of, unwrap
from .policies import Policy, Verdict, get_policy
from .roles import Role, as_role
from .scaling import NONE, Scaling, WidthScale, scalings
from .use import observe, with_use
from .walk import trainable, walk


@dataclass(frozen=True)
class Options:
    """How to build groups; see `build_param_groups` for the meaning of each.

    Attributes mirror the arguments of `build_param_groups`.
    """

    weight_decay: float = 0.01
    policy: str | Policy = "hygiene"
    roles: Mapping[Role | str, Setting] | None = None
    overrides: Overrides | None = None
    layer_decay: float | None = None
    lr: float | Tensor | None = None
    example_inputs: Any = None
    lr_by_role: Mapping[Role | str, float] | str | None = None
    width: WidthScale | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What was decided for one tensor, and why.

    Attributes:
        name: Canonical name.
        param: The tensor.
        located: The tensor with all its places.
        role: What the tensor is for.
        decays: Whether it is in a decay group.
        rule: The kind of evidence that decided: override, mark, adapter, type, structure, name, shape,
            default or policy.
        evidence: The evidence in words.
        because: The evidence in a word or two, the same for all layers that repeat.
        confidence: `high`, `medium` or `low`.
        options: The group options, `weight_decay` among them.
        lr_scale: Factor on the learning rate.
        layer: Layer number under layer-wise decay.
        chosen: Whether a person asked for it: an override, a mark, a hook or `roles=`.
        disputed: Whether the places of a shared tensor speak for decay and against it.
        contradicted: Its roles by name and by use in a forward pass, in words, if they differ.
        multiplier: What the model has to multiply the result of this map by, under `width=`.
        scaled: What `width=` did, in words.
    """

    name: str
    param: Tensor
    located: Located
    role: Role
    decays: bool
    rule: Rule
    evidence: str
    because: str
    confidence: Confidence
    options: Mapping[str, Any]
    lr_scale: float
    layer: int | None
    chosen: bool
    disputed: bool
    contradicted: str = ""
    multiplier: float = 1.0
    scaled: str = ""

    @property
    def owner(self) -> str:
        """Class name of the module that owns the tensor."""
        return class_of(self.located.places[0].owner).__name__

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.located.aliases

    def __str__(self) -> str:
        """One sentence: `transformer.ln_f.weight does not decay: ...`."""
        verb = f"decays ({self.options['weight_decay']:g})" if self.decays else "does not decay"
        shared = f", shared with {', '.join(self.aliases)}," if self.aliases else ""
        scale = f"; its learning rate is scaled by {self.lr_scale:.4g}" if self.lr_scale != 1 else ""
        scale += f"; {self.scaled}" if self.scaled else ""
        sure = "" if self.confidence == "high" else f" [{self.confidence} confidence]"
        return f"{self.name}{shared} {verb}: {self.evidence}{scale}{sure}."


@dataclass
class _Draft:
    """A decision in the making: options pile up, the last word on decay is remembered."""

    decays: bool
    rule: Rule
    evidence: str
    confidence: Confidence
    because: str
    options: dict[str, Any] = field(default_factory=dict)
    chosen: bool = False
    disputed: bool = False

    def apply(self, options: Mapping[str, Any], rule: Rule, evidence: str, because: str) -> None:
        if "weight_decay" in options:
            self.options.pop("weight_decay_scale", None)  # a later absolute value is absolute
        self.options.update(options)
        decays = _says(options, self.decays)
        if decays is None:  # speaks about something else, the learning rate say
            self.evidence += f"; {evidence}"
            return
        self.decays, self.rule, self.evidence, self.because = decays, rule, evidence, because
        self.confidence, self.chosen = "high", True


def decide(model: nn.Module, options: Options, *, allow_none: bool = False) -> list[Decision]:
    """Decide every trainable tensor of a model.

    Args:
        model: The model, wrapped or not.
        options: Policy, knobs and overrides.
        allow_none: Return an empty list instead of refusing a model without trainable parameters.

    Returns:
        One decision per trainable tensor, in the order of `named_parameters()`.

    Raises:
        TypeError: If `model` is not a module, or a parameter or an argument has a wrong type.
        ValueError: If there is nothing to train, or an argument is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    policy = get_policy(options.policy)
    weight_decay = as_number(options.weight_decay, "weight_decay")
    if options.lr is not None and not isinstance(options.lr, Tensor):
        as_number(options.lr, "lr")
    located = walk(model)
    chosen = trainable(located)
    if not chosen and not allow_none:
        raise ValueError(_nothing_to_train(model, located))
    table = _role_table(policy, options.roles)
    overrides = parse_overrides(options.overrides, located)
    findings = find_roles(model, located, options, policy)
    scaled = scalings(
        model, located, findings, options.layer_decay, options.lr_by_role, options.width, options.lr
    )
    marks = Marks() if policy.marks else None
    listed = (call_hook(unwrap(model), "no_weight_decay") or ()) if policy.rule else ()
    decisions = []
    for item in chosen:
        finding = findings[id(item)]
        draft = _draft(item, finding, policy, table, tuple(listed))
        mark = marks.find(item) if marks else None
        if mark:
            draft.apply(mark.options, "mark", mark.evidence, mark.because)
        for override in overrides:
            if override.matches(item):
                said = _say_override(override)
                draft.apply(override.options, "override", said, said)
        decisions.append(_finish(item, finding, draft, weight_decay, scaled.get(item.name, NONE)))
    if any(d.lr_scale != 1 for d in decisions) and options.lr is None:
        raise ValueError("lr_scale and layer_decay scale a learning rate; expected lr=, got None")
    return decisions


def find_roles(
    model: nn.Module, located: list[Located], options: Options, policy: Policy
) -> dict[int, Finding]:
    """Find the role of every tensor, by use too if there are example inputs and the policy looks at roles."""
    findings = identify(located)
    if options.example_inputs is not None and policy.decays is not None:
        try:
            findings = with_use(located, findings, observe(model, located, options.example_inputs))
        except Exception as error:
            said = next(iter(str(error).strip().splitlines()), "")
            warnings.warn(
                f"example_inputs: the forward pass raised {type(error).__name__}: {said}; "
                "the groups are built without it",
                ParamGroupWarning,
                stacklevel=4,
            )
    return with_ends(model, located, findings)


def _draft(
    item: Located,
    finding: Finding,
    policy: Policy,
    table: Mapping[Role, tuple[Verdict, Mapping[str, Any]]],
    listed: tuple[str, ...],
) -> _Draft:
    if policy.rule is not None:
        decays, why = policy.rule(item, listed)
        return _Draft(decays, "policy", f"{policy.name}: {why}", "high", why)
    (decays, why), extra = table[_row(finding, table)]
    evidence, confidence = f"{finding.evidence}; {why}", finding.confidence
    disputed = any(table[role][0][0] != decays for role in finding.others)
    if disputed:
        evidence = f"its places speak for different roles ({finding.places}) and the first decides; {why}"
        confidence = "low"
    return _Draft(
        decays, finding.rule, evidence, confidence, finding.because, dict(extra), bool(extra), disputed
    )


def _row(finding: Finding, table: Mapping[Role, tuple[Verdict, Mapping[str, Any]]]) -> Role:
    """The line of the table that decides: what `roles=` asks of matrices it asks of outputs too."""
    role, base = finding.role, finding.base
    if base is None or (role in table and (table[role][1] or not table[base][1])):
        return role
    return base


def _finish(
    item: Located, finding: Finding, draft: _Draft, weight_decay: float, scaling: Scaling
) -> Decision:
    chosen = {**scaling.options, **draft.options}
    decay = chosen.pop("weight_decay", draft.decays)
    if isinstance(decay, bool):
        decay = weight_decay * scaling.weight_decay if decay else 0.0
    chosen["weight_decay"] = float(decay * chosen.pop("weight_decay_scale", 1.0))
    scale = chosen.pop("lr_scale", 1.0) * scaling.lr
    return Decision(
        name=item.name,
        param=item.param,
        located=item,
        role=finding.role,
        decays=draft.decays,
        rule=draft.rule,
        evidence=draft.evidence,
        because=draft.because,
        confidence=draft.confidence,
        options=chosen,
        lr_scale=1.0 if "lr" in chosen else float(scale),
        layer=scaling.layer,
        chosen=draft.chosen,
        disputed=draft.disputed and not draft.chosen,
        contradicted=finding.contradicted,
        multiplier=scaling.multiplier,
        scaled=scaling.said,
    )


def _role_table(
    policy: Policy, roles: Mapping[Role | str, Setting] | None
) -> dict[Role, tuple[Verdict, Mapping[str, Any]]]:
    """The policy's table with the user's knobs: role -> (verdict, options)."""
    if policy.decays is None:
        if roles:
            raise ValueError(
                f"policy {policy.name!r} copies the rule of another tool and knows no roles; use overrides="
            )
        return {}
    table: dict[Role, tuple[Verdict, Mapping[str, Any]]] = {r: (v, {}) for r, v in policy.decays.items()}
    for name, setting in (roles or {}).items():
        role = as_role(name)
        options = parse_setting(setting, f"roles[{str(role)!r}]")
        decays = _says(options, table[role][0][0])
        verdict = table[role][0] if decays is None else (decays, f"roles= says so for {role}")
        table[role] = (verdict, options)
    return table


def _says(options: Mapping[str, Any], before: bool) -> bool | None:
    """What options say about decay, or None. A scale of what does not decay leaves it so."""
    if "weight_decay" in options:
        return bool(options["weight_decay"] > 0)
    if "weight_decay_scale" in options:
        return before and bool(options["weight_decay_scale"] > 0)
    return None


def _say_override(override: Override) -> str:
    said = ", ".join(f"{option}={value!r}" for option, value in override.options.items())
    return f"override {str(override)!r} sets {said}"


def _nothing_to_train(model: nn.Module, located: list[Located]) -> str:
    kind = class_of(unwrap(model)).__name__
    if not located:
        return f"{kind} has no parameters; expected a model with at least one trainable parameter"
    return (
        f"all {len(located)} parameters of {kind} are frozen (the first is {located[0].name!r}); expected at "
        "least one with requires_grad=True"
    )
