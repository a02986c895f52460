"""`python -m fused_adamw info`: versions, build, backends, and what steps the parameters of a model."""

from __future__ import annotations

import argparse
import platform

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..backends import available_backends, build_info, kernels_for
from ..device import gpu_names
from ..groups import build_param_groups
from ..optimizer import FusedHygieneAdamW
from ..version import __version__
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
        _print_step(args.target, console)


def _print_step(target: str, console: Console) -> None:
    """Step a model once, on zero gradients laid out as its parameters, and print what stepped them."""
    model = load_target(target)
    groups = build_param_groups(model, weight_decay=0.01)
    for group in groups:
        group["params"] = [
            nn.Parameter(torch.empty_like(p, device="cpu")) if p.is_meta else p for p in group["params"]
        ]
    names = [name for group in groups for name in group["param_names"]]
    params = [p for group in groups for p in group["params"]]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = FusedHygieneAdamW(groups)
    optimizer.step()
    plan = optimizer._plan
    assert plan is not None

    table = Table("stepped by", "device", "parameter", "gradient", "moments", "tensors")
    table.add_column("values", no_wrap=True)  # whole, in 80 columns, for any model that fits a machine
    for bucket, _, _ in plan.launches:
        kernels = kernels_for(optimizer.backend, bucket.device)
        formats = getattr(bucket, "formats", None)
        by = "reference" if kernels is None or formats is None else kernels.__name__.rpartition(".")[2]
        kept = ["any"] * 4 if formats is None else [format.name for format in formats]
        table.add_row(
            by,
            str(bucket.device),
            *kept[:2],
            ", ".join(dict.fromkeys(kept[2:])),
            f"{len(bucket.slots):,}",
            f"{sum(params[slot].numel() for slot in bucket.slots):,}",
        )
    console.print(f"{type(model).__name__}, one step:", table, sep="\n")
    for slot, reason in plan.fallbacks.items():
        console.print(f"{names[slot]} is stepped by the reference: {reason}", highlight=False, markup=False)


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None
