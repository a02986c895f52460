"""`python -m fused_adamw info`: versions, build, backends, and what steps the parameters of a model."""

from __future__ import annotations

import argparse
import platform
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..backends import available_backends, build_info, kernels_for
from ..device import gpu_names
from ..groups import explain_param_groups
from ..optimizer import FusedHygieneAdamW
from ..version import __version__
from . import precision
from .targets import load_target

HELP = "versions, build and backends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `info` on `parser`."""
    parser.add_argument(
        "--model",
        dest="target",
        metavar="TARGET",
        help="step this model once and print which backend steps how many parameters, and what falls back to "
        "the reference and why; takes memory for parameters, gradients and moments. As in `explain TARGET`",
    )
    precision.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print versions, how the extension was built, and which backends can run here; for a model, which do.

    Args:
        args: What `add_arguments` declared.
    """
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    built = build_info()
    archs = built.get("cuda_archs")
    triton = _version("triton")
    gpus = gpu_names()
    for name, value in {
        "fused_adamw": __version__,
        "torch": torch.__version__,
        "triton": triton or "not installed",
        "python": platform.python_version(),
        "GPU": ", ".join(gpus) or "none",
        "CPU kernels": built.get("cpu_capability", "not built"),
        "CUDA kernels": f"CUDA {built['cuda_version']}: {archs}" if archs else "not built",
        "compiler": built.get("compiler", "unknown"),
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    table = Table("backend", "device", "available", "why not")
    for status in available_backends():
        table.add_row(status.backend, status.device, "yes" if status.available else "no", status.reason or "")
    console.print(table)
    if args.target is not None:
        _print_step(args, console)
    elif precision.is_asked(args):
        raise ValueError("options about formats without --model: expected both")


def _print_step(args: argparse.Namespace, console: Console) -> None:
    """Step a model once, on zero gradients laid out as its parameters, and print what stepped them."""
    model = precision.converted(load_target(args.target), args)
    options = precision.options_of(args)
    decisions = explain_param_groups(model).decisions
    kept = precision.KeptReport(decisions, options)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        optimizer = FusedHygieneAdamW(model, **options)
    by_id = {id(d.param): d for d in decisions}
    decision_of = [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["params"] = [
            nn.Parameter(torch.empty_like(p, device="cpu")) if p.is_meta else p for p in group["params"]
        ]
        optimizer._param_names.learn(group)
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    plan = optimizer._plan
    assert plan is not None

    table = Table("stepped by", "device", "parameter", "gradient", "moments", "tensors")
    for heading in ("values", "bytes"):  # whole, in 80 columns, for any model that fits a machine
        table.add_column(heading, no_wrap=True)
    for bucket, _, _ in plan.launches:
        kernels = kernels_for(optimizer.backend, bucket.device)
        formats = getattr(bucket, "formats", None)
        by = "reference" if kernels is None or formats is None else kernels.__name__.rpartition(".")[2]
        names = ["any"] * 4 if formats is None else [format.name for format in formats.present.values()]
        mine = [decision_of[slot] for slot in bucket.slots]
        table.add_row(
            by,
            str(bucket.device),
            *names[:2],
            ", ".join(dict.fromkeys(names[2:])),
            f"{len(mine):,}",
            f"{sum(d.param.numel() for d in mine):,}",
            f"{kept.nbytes(mine):,}",
        )
    console.print(f"{type(model).__name__}, one step:", table, sep="\n")
    for slot, reason in plan.fallbacks.items():
        name = decision_of[slot].name
        console.print(f"{name} is stepped by the reference: {reason}", highlight=False, markup=False)
    console.print(kept)
    for remark in remarks:
        console.print(f"warning: {remark.message}", highlight=False, markup=False)


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None
