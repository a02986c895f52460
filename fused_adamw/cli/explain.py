"""`python -m fused_adamw explain TARGET`: prints which parameters decay, and why."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, TypeVar

from rich.console import Console
from torch import nn

from ..groups import POLICIES, explain_param_groups
from ..groups.overrides import Setting
from . import precision
from .inputs import inputs_of, parse_inputs
from .targets import load_target

_T = TypeVar("_T", int, float)
HELP = "which parameters of a model decay, how they and their moments are kept, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `explain` on `parser`."""
    parser.add_argument(
        "target",
        help="package.module:factory, timm:resnet50, transformers:gpt2 or diffusers:FluxTransformer2DModel; "
        "nothing is downloaded",
    )
    parser.add_argument("parameters", nargs="*", help="explain only these parameters, one sentence each")
    parser.add_argument("--weight-decay", type=_amount, default=0.01, help="default: %(default)s")
    parser.add_argument("--policy", choices=POLICIES, default="hygiene", help="default: %(default)s")
    parser.add_argument("--diff", metavar="POLICY", choices=POLICIES, help="show where POLICY would disagree")
    parser.add_argument(
        "--role", action="append", default=[], metavar="ROLE=VALUE", help="true, false or a weight decay"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="GLOB=VALUE", help="true, false or a weight decay"
    )
    parser.add_argument(
        "--layer-decay", type=_factor, metavar="FACTOR", help="layer-wise learning-rate decay"
    )
    parser.add_argument("--lr", type=_amount, help="learning rate that --layer-decay scales; default: 0.001")
    parser.add_argument(
        "--inputs",
        action="append",
        default=[],
        metavar="SIZES:DTYPE",
        help="watch a forward pass on such a tensor, e.g. B=2,T=16:int64 or input_ids@2,16:int64; again for "
        "each further one. Library models have inputs of their own",
    )
    parser.add_argument("--no-inputs", action="store_true", help="watch no forward pass")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--width", type=_columns, help="columns of the table")
    precision.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run `explain`.

    Args:
        args: What `add_arguments` declared.

    Raises:
        ValueError: If two arguments contradict each other, or one cannot be met.
        KeyError: If no parameter has a name that was asked for.
    """
    _refuse_contradictions(args)
    model = precision.converted(load_target(args.target), args)
    report = explain_param_groups(
        model,
        args.weight_decay,
        policy=args.policy,
        roles=dict(_pair(text, "--role") for text in args.role),
        overrides=[_pair(text, "--override") for text in args.override],
        layer_decay=args.layer_decay,
        lr=1e-3 if args.lr is None else args.lr,
        example_inputs=_example_inputs(args, model),
    )
    shown = report.diff(args.diff) if args.diff else report
    kept = precision.KeptReport(report.decisions, precision.options_of(args))
    sentences = [report[name] for name in args.parameters]
    if precision.is_asked(args):
        sentences += [kept.sentence(report.decision(name)) for name in args.parameters]
    if args.json:
        found = shown.to_dict()
        if not args.diff:
            for d, parameter in zip(report.decisions, found["parameters"], strict=True):
                parameter["kept"] = kept.to_dict(d)
        print(json.dumps(found, indent=2))
    elif sentences:
        print("\n".join(sentences))
    else:
        console = Console(width=args.width)
        console.print(shown)
        if not args.diff:
            console.print(kept if precision.is_asked(args) else kept.total())


def _example_inputs(args: argparse.Namespace, model: nn.Module) -> Any:
    if args.inputs:
        return parse_inputs(args.inputs)
    return None if args.no_inputs else inputs_of(args.target.partition(":")[0], model)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    given = {"--json": args.json, "--diff": args.diff, "--width": args.width}
    if args.parameters:
        for option, value in given.items():
            if value:
                raise ValueError(f"{option} and names of parameters: expected one, as each gets a sentence")
    if args.inputs and args.no_inputs:
        raise ValueError("--inputs and --no-inputs: expected one")
    if args.json and args.width:
        raise ValueError("--json and --width: expected one, as a width is for tables")
    if args.lr is not None and args.layer_decay is None:
        raise ValueError("--lr without --layer-decay: expected both, as only --layer-decay scales it")
    if args.diff and precision.is_asked(args):
        raise ValueError("--diff and options about formats: expected one, as policies are about decay")
    roles = [text.rpartition("=")[0] for text in args.role]
    for role in roles:
        if roles.count(role) > 1:
            raise ValueError(f"--role {role}: expected once, got {roles.count(role)} values")


def _amount(text: str) -> float:
    value = _parsed(float, text)
    if value is None or not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return value


def _factor(text: str) -> float:
    value = _parsed(float, text)
    if value is None or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a factor in (0, 1], got {text!r}")
    return value


def _columns(text: str) -> int:
    value = _parsed(int, text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of columns >= 1, got {text!r}")
    return value


def _parsed(kind: type[_T], text: str) -> _T | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _pair(text: str, option: str) -> tuple[str, Setting]:
    key, equals, value = text.rpartition("=")
    named = {"true": True, "false": False}.get(value.lower())
    try:
        if equals:
            return key, float(value) if named is None else named
    except ValueError:
        pass
    raise ValueError(f"{option} {text!r}: expected NAME=true, NAME=false or NAME=NUMBER")
