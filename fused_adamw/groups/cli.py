"""`python -m fused_adamw explain TARGET`: prints which parameters decay, and why."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from .overrides import Setting
from .policies import POLICIES
from .report import explain_param_groups
from .targets import load_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `explain` on `parser`."""
    parser.add_argument(
        "target",
        help="package.module:factory, timm:resnet50, transformers:gpt2 or diffusers:FluxTransformer2DModel; "
        "nothing is downloaded",
    )
    parser.add_argument("parameters", nargs="*", help="explain only these parameters, one sentence each")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument("--policy", choices=POLICIES, default="hygiene", help="default: %(default)s")
    parser.add_argument("--diff", metavar="POLICY", choices=POLICIES, help="show where POLICY would disagree")
    parser.add_argument(
        "--role", action="append", default=[], metavar="ROLE=VALUE", help="true, false or a weight decay"
    )
    parser.add_argument(
        "--override", action="append", default=[], metavar="GLOB=VALUE", help="true, false or a weight decay"
    )
    parser.add_argument("--layer-decay", type=float, metavar="FACTOR", help="layer-wise learning-rate decay")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate that --layer-decay scales")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--width", type=int, help="columns of the table")


def run(args: argparse.Namespace) -> int:
    """Run `explain`.

    Args:
        args: What `add_arguments` declared.

    Returns:
        0, or 2 if the request cannot be met; the reason goes to stderr.
    """
    try:
        report = explain_param_groups(
            load_target(args.target),
            args.weight_decay,
            policy=args.policy,
            roles=dict(_pair(text, "--role") for text in args.role),
            overrides=[_pair(text, "--override") for text in args.override],
            layer_decay=args.layer_decay,
            lr=args.lr,
        )
        shown = report.diff(args.diff) if args.diff else report
        sentences = [report[name] for name in args.parameters]
    except (TypeError, ValueError, KeyError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    if args.json:
        print(shown.to_json())
    elif sentences:
        print("\n".join(sentences))
    else:
        Console(width=args.width).print(shown)
    return 0


def _pair(text: str, option: str) -> tuple[str, Setting]:
    key, equals, value = text.rpartition("=")
    named = {"true": True, "false": False}.get(value.lower())
    try:
        if equals:
            return key, float(value) if named is None else named
    except ValueError:
        pass
    raise ValueError(f"{option} {text!r}: expected NAME=true, NAME=false or NAME=NUMBER")
