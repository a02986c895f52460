"""`python -m fused_adamw coord-check TARGET`: whether activations keep their size as a model gets wider.

Models of several widths are trained for a few steps. Where a learning rate suits every width, the change that
training makes to the result of each layer has one size; elsewhere it grows with width, or vanishes.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..groups import WidthScale, build_param_groups
from ..optimizer import FusedHygieneAdamW
from .inputs import parse_inputs
from .targets import find

HELP = "whether activations keep their size as a model gets wider"
Changes = dict[str, dict[int, float]]  # layer -> width -> mean change of its results
Factory = Callable[[int], nn.Module]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `coord-check` on `parser`."""
    parser.add_argument(
        "target", help="package.module:factory, called with width=, and with mup= if it has such an argument"
    )
    parser.add_argument(
        "--inputs",
        action="append",
        default=[],
        required=True,
        metavar="SIZES:DTYPE",
        help="e.g. B=4,T=16:int64, filled with random values; again for each further one",
    )
    parser.add_argument("--widths", type=_widths, default=[64, 128, 256, 512], help="default: 64,128,256,512")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="runs to average over; default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the changes; needs matplotlib")


def run(args: argparse.Namespace) -> None:
    """Run `coord-check`.

    Args:
        args: What `add_arguments` declared.

    Raises:
        ValueError: If the target, the inputs or a number is not as expected.
    """
    if min(args.steps, args.seeds) < 1 or not (math.isfinite(args.lr) and args.lr > 0):
        raise ValueError("--steps and --seeds: expected numbers >= 1; --lr: expected a number > 0")
    factory, inputs = find(args.target), parse_inputs(args.inputs)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(f"target {args.target!r}: expected a function of width")
    check = Check(inputs, args.steps, args.seeds, args.lr)
    changes = {
        title: check.changes(_of(factory, mup), args.widths, scales=mup)
        for title, mup in (("one lr", False), ("width=", True))
    }
    table = Table("layer", *(f"{title}: × per doubling" for title in changes))
    for layer in next(iter(changes.values())):
        table.add_row(layer, *(f"{2 ** slope(of_run[layer]):.2f}" for of_run in changes.values()))
    Console().print(table)
    if args.plot is not None:
        plot(changes, args.plot)


def _of(factory: Callable[..., nn.Module], mup: bool) -> Factory:
    known = {"mup": mup} if "mup" in inspect.signature(factory).parameters else {}
    return lambda width: factory(width=width, **known)


@dataclass(frozen=True)
class Check:
    """How models of several widths are trained.

    Attributes:
        inputs: Positional arguments, or a mapping of keyword ones. Integers are drawn below the rows of the
            model's first table, or 2; numbers from a normal distribution.
        steps: How many steps to train.
        seeds: How many runs to average over.
        lr: The learning rate of the narrowest model.
    """

    inputs: Any
    steps: int
    seeds: int
    lr: float

    def changes(self, factory: Factory, widths: Sequence[int], scales: bool) -> Changes:
        """Measure how much training changes the result of each layer, on average over its elements.

        Args:
            factory: Makes a model of a width.
            widths: The widths; the first is the base.
            scales: Whether learning rates are scaled by width.
        """
        with torch.random.fork_rng(devices=()):
            width_scale = WidthScale(factory(widths[0])) if scales else None
            found: Changes = {}
            for width in widths:
                for seed in range(self.seeds):
                    torch.manual_seed(seed)
                    for layer, change in self._train(factory(width), width_scale).items():
                        by_width = found.setdefault(layer, {})
                        by_width[width] = by_width.get(width, 0.0) + change / self.seeds
        return found

    def _train(self, model: nn.Module, width: WidthScale | None) -> dict[str, float]:
        args, kwargs = _drawn(self.inputs, model)
        groups = build_param_groups(model, 0.0, lr=self.lr, width=width)
        optimizer = FusedHygieneAdamW(groups, lr=self.lr)
        before = _results(model, args, kwargs)
        targets = None
        for _ in range(self.steps):
            logits = _first_tensor(model(*args, **kwargs)).flatten(0, -2)
            if targets is None:
                targets = torch.randint(logits.shape[-1], (len(logits),))
            nn.functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        after = _results(model, args, kwargs)
        return {layer: float((after[layer] - result).abs().mean()) for layer, result in before.items()}


def slope(by_width: Mapping[int, float]) -> float:
    """The slope of a line through log2(change) over log2(width): 0 where the change does not depend on it."""
    x = torch.tensor([math.log2(width) for width in by_width], dtype=torch.float64)
    y = torch.tensor([math.log2(max(change, 1e-30)) for change in by_width.values()], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def plot(changes: Mapping[str, Changes], file: Path) -> None:
    """Draw one panel per run: the change of each layer over widths, both logarithmic.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(changes), sharey=True)
    for panel, (title, of_run) in zip(panels, changes.items(), strict=True):
        for layer, by_width in of_run.items():
            panel.plot(list(by_width), list(by_width.values()), marker="o", markersize=3, label=layer)
        panel.set(title=title, xlabel="width", xscale="log", yscale="log")
        panel.set_xticks(list(by_width), [str(width) for width in by_width])
        panel.minorticks_off()
    panels[0].set_ylabel("mean change of a layer's result")
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=150)


def _results(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What every layer with parameters of its own returns; of several calls the last."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output.detach().clone()

    layers = {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    handles = [m.register_forward_hook(partial(keep, name)) for name, m in layers.items()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _drawn(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    rows = 2 if table is None else table.num_embeddings

    def draw(t: Tensor) -> Tensor:
        return torch.randn_like(t) if t.is_floating_point() else torch.randint_like(t, rows)

    if isinstance(inputs, Mapping):
        return (), {name: draw(t) for name, t in inputs.items()}
    return tuple(draw(t) for t in inputs), {}


def _first_tensor(output: Any) -> Tensor:
    value = getattr(output, "logits", output)
    value = value[0] if isinstance(value, (tuple, list)) else value
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise ValueError("coord-check: expected a model that returns logits, classes in the last dimension")
    return value


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) < 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected two widths or more, like 64,128,256, got {text!r}")
    return sorted({int(part) for part in parts})
