"""The command line of the example: parsed, checked as a whole, and handed on as plain values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loop import AMP_DTYPES, Settings
from models import GPTConfig, ResNetConfig
from ranks import STRATEGIES, Ranks, launched
from recipes import PRECISIONS
from schedules import SCHEDULES

from fused_adamw.backends import check_backend, kernels_for

QUICK_SHARE = 0.05
QUICK_STEPS = 60
SEEDS = 3
WARMUP = 50  # a shorter one parts equal optimizers by rounding: early on, steps are large and erratic
CHECKPOINT_EVERY = 100
EMA_DECAY = 0.99  # for hundreds of steps; where there are many more, 0.999 or 0.9999
GUARD_SIGMAS = 6.0

CONFIGS = {"gpt": GPTConfig, "cnn": ResNetConfig}
SIZES = {"gpt": ("layers", "heads", "width", "context"), "cnn": ("blocks", "channels")}
#: What makes a default run take about two minutes on two cores.
DEFAULTS = {
    "gpt": {"max_steps": 500, "batch_size": 16, "lr": 6e-3},
    "cnn": {"max_steps": 250, "batch_size": 32, "lr": 6e-3},
}


@dataclass(frozen=True)
class Options:
    """All that the command line decides."""

    model: str
    config: GPTConfig | ResNetConfig
    settings: Settings
    data: Path | None
    data_share: float
    precisions: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    checkpoint_every: int | None
    resume: bool
    force_fresh: bool
    ranks: Ranks


def at_least(lowest: int) -> Callable[[str], int]:
    """Make an argparse type: a whole number that is not below `lowest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return value

    return integer


def positive_or_infinite(text: str) -> float:
    """Parse a number above zero; infinity is one, NaN is not."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive(text: str) -> float:
    """Parse a finite number above zero."""
    value = positive_or_infinite(text)
    if value == math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def finite(text: str) -> float:
    """Parse a finite number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to just below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def device(text: str) -> str:
    """Parse the name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a small model with torch's AdamW and with FusedHygieneAdamW, and compare them.",
        epilog="Exit status: 0; 1 if the two loss curves part within the first 50 steps; 2 for a bad option.",
    )
    count = at_least(1)

    def default(name: str) -> str:
        return "default: " + ", ".join(f"{DEFAULTS[model][name]} for {model}" for model in CONFIGS)

    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model", choices=CONFIGS, default="gpt", help="a GPT on bytes (default) or a ResNet on digits"
    )
    what.add_argument(
        "--data", type=Path, metavar="PATH", help="gpt: a file or folder to learn instead of Python's library"
    )
    what.add_argument("--quick", action="store_true", help=f"5 %% of the data, {QUICK_STEPS} steps, one seed")
    what.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="the first seed (default: 0)")
    what.add_argument(
        "--seeds", type=count, metavar="N", help="how many seeds hygiene is judged by (default: 3)"
    )
    what.add_argument(
        "--precision",
        nargs="*",
        choices=PRECISIONS,
        metavar="NAME",
        help=f"compare these instead of optimizers, all if none is named: {', '.join(PRECISIONS)}",
    )
    what.add_argument(
        "--out", type=Path, metavar="DIR", help="where the results go (default: runs/<model>, runs/precision)"
    )

    sizes = parser.add_argument_group("the model")
    for model, names in SIZES.items():
        for name in names:
            size = getattr(CONFIGS[model], name)
            sizes.add_argument(f"--{name}", type=count, metavar="N", help=f"{model} (default: {size})")
    sizes.add_argument("--dropout", type=share, default=0.0, metavar="SHARE", help="default: 0")

    training = parser.add_argument_group("the training")
    training.add_argument("--max-steps", type=count, metavar="N", help=f"updates ({default('max_steps')})")
    training.add_argument(
        "--batch-size", type=count, metavar="N", help=f"examples per batch ({default('batch_size')})"
    )
    training.add_argument(
        "--accumulate", type=count, default=1, metavar="N", help="batches per update (default: 1)"
    )
    training.add_argument("--lr", type=positive, help=f"the highest learning rate ({default('lr')})")
    training.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate (default: cosine)"
    )
    training.add_argument(
        "--warmup",
        type=at_least(0),
        metavar="N",
        help=f"steps from lr/10 to lr (default: {WARMUP}, at most half of all)",
    )
    training.add_argument("--weight-decay", type=finite, default=0.1, help="default: 0.1")
    training.add_argument(
        "--clip",
        type=positive_or_infinite,
        default=1.0,
        metavar="NORM",
        help="the highest gradient norm; inf measures and never clips (default: 1)",
    )
    training.add_argument(
        "--label-smoothing",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of the training loss (default: 0)",
    )
    training.add_argument(
        "--eval-every", type=count, metavar="N", help="steps between validations (default: a tenth of all)"
    )
    training.add_argument(
        "--patience", type=count, metavar="N", help="stop after N validations without a lower loss"
    )

    besides = parser.add_argument_group("what FusedHygieneAdamW does besides")
    besides.add_argument(
        "--ema",
        type=share,
        nargs="?",
        const=EMA_DECAY,
        metavar="DECAY",
        help=f"average the weights, and validate with the averages too ({EMA_DECAY} if not said)",
    )
    besides.add_argument(
        "--guard",
        type=positive,
        nargs="?",
        const=GUARD_SIGMAS,
        metavar="SIGMAS",
        help="skip a step whose gradient norm or loss is so many standard deviations above those before "
        f"({GUARD_SIGMAS:g} if not said)",
    )
    besides.add_argument(
        "--stats", action="store_true", help="log and draw how large updates are beside the weights, by role"
    )

    machine = parser.add_argument_group("how it is computed")
    machine.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one",
    )
    machine.add_argument(
        "--backend", default="auto", help="of FusedHygieneAdamW: auto (default), reference, native, triton"
    )
    machine.add_argument(
        "--distributed",
        choices=STRATEGIES,
        help="share the work among the processes that torchrun has started (gpt only)",
    )
    machine.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision; fp16 scales the loss")
    machine.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations to save memory"
    )

    again = parser.add_argument_group("checkpoints")
    again.add_argument(
        "--checkpoint",
        type=count,
        nargs="?",
        const=CHECKPOINT_EVERY,
        metavar="STEPS",
        help=f"save every STEPS steps ({CHECKPOINT_EVERY} if not said) and at the end",
    )
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoints of an earlier run, and keep saving",
    )
    again.add_argument(
        "--force-fresh", action="store_true", help="start over, whatever checkpoints there are"
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> Options:
    """Parse the command line; leave with a message and status 2 if it does not make sense as a whole."""
    parser = build_parser()
    args = parser.parse_args(argv)

    for model, names in SIZES.items():
        for name in names:
            if model != args.model and getattr(args, name) is not None:
                parser.error(f"--{name} is a size of --model {model}, not of {args.model}")
    sizes = {name: getattr(args, name) for name in SIZES[args.model] if getattr(args, name) is not None}
    config = CONFIGS[args.model](**sizes, dropout=args.dropout)
    if isinstance(config, GPTConfig) and config.width % config.heads:
        parser.error(f"--width {config.width} cannot be divided among --heads {config.heads}")

    if args.data is not None and args.model != "gpt":
        parser.error(f"--data is text for --model gpt; {args.model} learns scikit-learn's digits")
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist")
    if args.precision is not None and args.model != "gpt":
        parser.error("--precision is for --model gpt: BatchNorm's running averages need float32")
    if args.precision is not None and args.amp is not None:
        parser.error("--precision says what is computed in which dtype, and so does --amp: give one of them")
    if args.resume and args.force_fresh:
        parser.error("--resume continues and --force-fresh starts over: give one of them")

    defaults = DEFAULTS[args.model] | ({"max_steps": QUICK_STEPS} if args.quick else {})
    chosen: dict[str, Any] = {
        name: value if getattr(args, name) is None else getattr(args, name)
        for name, value in defaults.items()
    }
    tenth = max(1, chosen["max_steps"] // 10)
    warmup = min(WARMUP, chosen["max_steps"] // 2) if args.warmup is None else args.warmup
    if warmup >= chosen["max_steps"]:
        parser.error(f"--warmup {warmup} leaves none of the --max-steps {chosen['max_steps']}")
    if args.schedule == "onecycle" and warmup == 0:
        parser.error("--schedule onecycle needs a rise: at least --warmup 1 and --max-steps 2")
    try:
        ranks = launched(args.distributed)
        args.device = ranks.device(args.device)
    except ValueError as error:
        parser.error(f"argument --distributed: {error}")
    if chosen["batch_size"] % ranks.size:
        parser.error(f"--batch-size {chosen['batch_size']} cannot be divided among {ranks.size} processes")
    if ranks.strategy is not None and args.model == "cnn":
        parser.error(
            "--distributed is for --model gpt: BatchNorm would see a share of each batch, not the batch"
        )
    try:
        check_backend(args.backend)
        kernels_for(args.backend, torch.device(args.device))
    except (ValueError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")

    settings = Settings(
        **chosen,
        warmup=warmup,
        eval_every=args.eval_every or tenth,
        weight_decay=args.weight_decay,
        accumulate=args.accumulate,
        clip=args.clip,
        schedule=args.schedule,
        label_smoothing=args.label_smoothing,
        amp=args.amp,
        patience=args.patience,
        ema=args.ema,
        guard=args.guard,
        stats=args.stats,
        gradient_checkpointing=args.gradient_checkpointing,
        device=args.device,
        backend=args.backend,
    )
    seeds = args.seeds or (1 if args.quick else SEEDS)
    return Options(
        model=args.model,
        config=config,
        settings=settings,
        data=args.data,
        data_share=QUICK_SHARE if args.quick else 1.0,
        precisions=tuple(PRECISIONS if args.precision == [] else dict.fromkeys(args.precision or ())),
        seeds=tuple(range(args.seed, args.seed + seeds)),
        out=args.out or Path("runs", args.model if args.precision is None else "precision"),
        checkpoint_every=args.checkpoint or (CHECKPOINT_EVERY if args.resume else None),
        resume=args.resume,
        force_fresh=args.force_fresh,
        ranks=ranks,
    )
