"""The report on parameter groups: every decision with its reason, and how another policy would differ."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .build import group_decisions
from .decide import Decision, Options, decide
from .lint import Lint, lint
from .overrides import Overrides, Setting
from .places import canonical, class_of, tensors_of, unwrap
from .policies import Policy, get_policy
from .roles import Role
from .scaling import WidthScale

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, eq=False)
class ParamGroupReport:
    """What was decided for every trainable parameter of a model, and why.

    `print(report)` shows a table, `report[name]` one sentence. `rich.print(report)` adds colour.

    Attributes:
        model: The model.
        options: What the groups were asked for.
        decisions: One per tensor, in the order of `named_parameters()`.
        groups: The parameter groups.
        lints: Remarks, warnings first.
    """

    model: nn.Module = field(repr=False)
    options: Options = field(repr=False)
    decisions: Sequence[Decision] = field(repr=False)
    groups: Sequence[Mapping[str, Any]] = field(repr=False)
    lints: Sequence[Lint] = field(repr=False)

    @property
    def model_name(self) -> str:
        """Class name of the model, wrappers left out."""
        return class_of(unwrap(self.model)).__name__

    @property
    def policy(self) -> Policy:
        return get_policy(self.options.policy)

    @property
    def multipliers(self) -> dict[str, float]:
        """What the model has to multiply the results of maps by, under `width=`: name -> factor."""
        return {d.name: d.multiplier for d in self.decisions if d.multiplier != 1}

    def __getitem__(self, name: str) -> str:
        """Explain one parameter in a sentence; aliases and wrapped names are understood."""
        return str(self.decision(name))

    def decision(self, name: str) -> Decision:
        """Return the decision for one parameter.

        Args:
            name: Its name or an alias, with or without wrapper components.

        Raises:
            KeyError: If no trainable parameter is called so.
        """
        for wanted in (name, canonical(name)):
            for decision in self.decisions:
                if wanted == decision.name or wanted in decision.aliases:
                    return decision
        close = difflib.get_close_matches(name, [d.name for d in self.decisions], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise KeyError(f"no trainable parameter is called {name!r}{hint}")

    def diff(self, policy: str | Policy) -> PolicyDiff:
        """Compare with another policy, overrides and weight decay unchanged.

        Args:
            policy: The other policy.

        Returns:
            The parameters on which the two disagree about decay.
        """
        other = replace(self.options, policy=policy, roles=None)
        theirs = {decision.name: decision for decision in decide(self.model, other)}
        pairs = [(mine, theirs[mine.name]) for mine in self.decisions]
        return PolicyDiff(self, get_policy(policy), [(a, b) for a, b in pairs if a.decays != b.decays])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return {
            "model": self.model_name,
            "policy": self.policy.name,
            "weight_decay": float(self.options.weight_decay),
            "groups": [_group(group) for group in self.groups],
            "parameters": [_parameter(decision) for decision in self.decisions],
            "lint": [
                {
                    "code": remark.code,
                    "level": remark.level,
                    "message": remark.message,
                    "names": list(remark.names),
                }
                for remark in self.lints
            ],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as a JSON document.

        Args:
            indent: Spaces per level; None: all in one line.
        """
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> RenderableType:
        from .render import report_table

        title = f"{self.model_name}, policy {self.policy.name}"
        return report_table(title, self.decisions, len(self.groups), self.lints)

    def __str__(self) -> str:
        return _as_text(self, self.decisions)


@dataclass(frozen=True, eq=False)
class PolicyDiff:
    """Where two policies disagree.

    Attributes:
        report: The report that was compared.
        policy: The other policy.
        pairs: (our decision, the other one) for each parameter on which they disagree.
    """

    report: ParamGroupReport = field(repr=False)
    policy: Policy
    pairs: Sequence[tuple[Decision, Decision]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Names of the parameters on which the policies disagree."""
        return [mine.name for mine, _ in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data, ready for JSON."""
        return {
            "model": self.report.model_name,
            "policies": [self.report.policy.name, self.policy.name],
            "parameters": [
                {
                    "name": mine.name,
                    "decays": [mine.decays, theirs.decays],
                    "evidence": [mine.evidence, theirs.evidence],
                }
                for mine, theirs in self.pairs
            ],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return the comparison as a JSON document.

        Args:
            indent: Spaces per level; None: all in one line.
        """
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> RenderableType:
        from .render import diff_table

        ours, theirs, total = self.report.policy.name, self.policy.name, len(self.report.decisions)
        title = f"{self.report.model_name}: {ours} and {theirs} disagree on {len(self)} of {total} tensors"
        return diff_table(title, ours, theirs, self.pairs)

    def __str__(self) -> str:
        return _as_text(self, [decision for pair in self.pairs for decision in pair])


def _as_text(report: ParamGroupReport | PolicyDiff, decisions: Sequence[Decision]) -> str:
    """Draw a table as text; without rich, which a copy of the package may lack, a sentence per decision."""
    try:
        from .render import plain
    except ImportError:
        return "\n".join(map(str, decisions))
    return plain(report)


def explain_param_groups(
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
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> ParamGroupReport:
    """Explain what `build_param_groups` does with the same arguments.

    Args:
        model: As for `build_param_groups`, like all that follow but the last.
        weight_decay: As above.
        policy: As above.
        roles: As above.
        overrides: As above.
        layer_decay: As above.
        lr: As above.
        example_inputs: As above.
        lr_by_role: As above.
        width: As above.
        groups: Groups that are in use, `optimizer.param_groups` say: the report then names the trainable
            parameters that are in none of them.

    Returns:
        The report.

    Raises:
        TypeError: As `build_param_groups`.
        ValueError: As `build_param_groups`.

    Examples:
        >>> report = explain_param_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 0.1)
        >>> print(report["1.weight"])
        1.weight does not decay: 1 is a LayerNorm; decay would pull a norm's gain to zero, not to one.
    """
    options = Options(
        weight_decay, policy, roles, overrides, layer_decay, lr, example_inputs, lr_by_role, width
    )
    decisions = decide(model, options)
    exempt_first = get_policy(policy).exempt_first
    used = group_decisions(decisions, lr, exempt_first) if groups is None else list(groups)
    return ParamGroupReport(model, options, decisions, used, lint(decisions, used))


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    params = tensors_of(group)
    return {"params": len(params), "values": sum(param.numel() for param in params), **options}


def _parameter(decision: Decision) -> dict[str, Any]:
    multiplier = {} if decision.multiplier == 1 else {"multiplier": decision.multiplier}
    return {
        "name": decision.name,
        "aliases": list(decision.aliases),
        "shape": list(decision.located.shape),
        "dtype": str(decision.param.dtype).removeprefix("torch."),
        "owner": decision.owner,
        "owner_name": decision.located.places[0].owner_name,
        "role": decision.role.value,
        "decays": decision.decays,
        "options": {key: _plain(value) for key, value in decision.options.items()},
        "lr_scale": decision.lr_scale,
        "layer": decision.layer,
        "rule": decision.rule,
        "evidence": decision.evidence,
        "confidence": decision.confidence,
        **multiplier,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))) else repr(value)
