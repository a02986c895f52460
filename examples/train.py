"""Train a small model with torch's AdamW and with FusedHygieneAdamW, and compare them.

From one seed: (1) torch's AdamW with `clip_grad_norm_`, (2) FusedHygieneAdamW, which must follow the same
curve, (3) FusedHygieneAdamW with uniform decay, to see what hygiene is worth. More seeds repeat (2) and (3).
The metrics go to `runs/<model>/metrics.jsonl`, the picture to `runs/<model>/curves.png`. Under torchrun, with
`--distributed`, several processes share each batch and follow the curves of one. With `--precision` the runs
are in several precisions instead, all with FusedHygieneAdamW. `--ema`, `--guard` and `--stats` show what it
does besides; with `--stats` there is `ratios.png`, too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import checkpoints
import torch
from compare import (
    SAME_PATH_STEPS,
    Gain,
    Timing,
    best_validation,
    jsonable,
    loss_differences,
    same_path,
    tolerance,
)
from data import Batches, digits_data, text_data
from loop import Row, Task, Trainer, identity
from models import GPTConfig
from options import Options, parse
from plotting import draw_picture, draw_ratios, ratios_by_role
from ranks import joined
from recipes import PRECISIONS, TITLES
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

#: The rows of every run, by its name and seed.
Results = dict[tuple[str, int], list[Row]]


class RefusedError(Exception):
    """What was asked for cannot be done, and why; nothing has run."""


def load_task(options: Options) -> Task:
    """Load the data, and see that it is enough to train and validate on."""
    try:
        if isinstance(options.config, GPTConfig):
            data = text_data(options.data, options.config.context, options.data_share)
        else:
            data = digits_data(options.data_share)
        Batches(data.train, options.settings.batch_size, seed=0)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    return Task(options.config, data)


def planned_runs(options: Options) -> list[tuple[str, int]]:
    """List the runs: torch's only for the first seed, which is enough to see whether the curves agree."""
    if options.precisions:
        return [(run, seed) for run in options.precisions for seed in options.seeds]
    first, *others = options.seeds
    return [(run, first) for run in TITLES] + [(run, seed) for seed in others for run in ("fused", "uniform")]


def checkpoint_path(options: Options, run: str, seed: int) -> Path:
    return options.out / "checkpoints" / f"{run}-seed{seed}.pt"


def find_checkpoints(options: Options, task: Task) -> dict[tuple[str, int], Path]:
    """Return the checkpoints to resume from, each seen to fit its run; remove them all for a fresh start."""
    found = sorted((options.out / "checkpoints").glob("*.pt"))
    if options.force_fresh:
        if options.ranks.first:
            for path in found:
                path.unlink()
        return {}
    if not options.resume:
        if found:
            raise RefusedError(
                f"{options.out} holds checkpoints of an earlier run: --resume continues it, --force-fresh "
                "starts over, --out goes elsewhere"
            )
        return {}
    paths = {key: checkpoint_path(options, *key) for key in planned_runs(options)}
    paths = {key: path for key, path in paths.items() if path.exists()}
    if not paths:
        raise RefusedError(f"{options.out} holds no checkpoint to resume from")
    for (run, seed), path in paths.items():
        try:
            state = checkpoints.load(path, identity(run, seed, task, options.settings))
        except checkpoints.CheckpointError as error:
            raise RefusedError(str(error)) from error
        if state["max_steps"] != options.settings.max_steps:
            print(
                f"{path.name}: the {options.settings.schedule} schedule now spans "
                f"{options.settings.max_steps} steps instead of {state['max_steps']}"
            )
    return paths


def train(trainer: Trainer, options: Options, metrics: TextIO) -> list[Row]:
    """Train one run to its end, writing its metrics and checkpoints; return all its rows."""
    for row in trainer.history:
        write(row, metrics)
    progress = tqdm(
        total=options.settings.max_steps,
        initial=trainer.step,
        desc=f"{trainer.run:>7}, seed {trainer.seed}",
        unit="step",
        mininterval=0.5,
        disable=not options.ranks.first,
    )
    with progress:
        for row in trainer.rows():
            write(row, metrics)
            progress.update()
            if row["val_loss"] is not None:
                score = trainer.task.score
                progress.set_postfix({"val loss": f"{row['val_loss']:.3f}", score: f"{row[score]:.3f}"})
            if options.checkpoint_every and trainer.step % options.checkpoint_every == 0:
                save(trainer, options)
    if options.checkpoint_every:
        save(trainer, options)
    if trainer.out_of_patience:
        print(f"stopped at step {trainer.step}: {options.settings.patience} validations without a lower loss")
    return trainer.history


def save(trainer: Trainer, options: Options) -> None:
    state = trainer.state_dict()  # all ranks gather it
    if options.ranks.first:
        checkpoints.save(state, checkpoint_path(options, trainer.run, trainer.seed))


def write(row: Row, metrics: TextIO) -> None:
    metrics.write(json.dumps(jsonable(row), allow_nan=False) + "\n")
    metrics.flush()


def report_path(results: Results, seed: int, allowed: float, console: Console) -> bool:
    """Print how close the two optimizers stay and what they cost; return whether the curves are the same."""
    torch_rows, fused_rows = results["torch", seed], results["fused", seed]
    differences = loss_differences(torch_rows, fused_rows)
    same = same_path(differences, allowed)

    table = Table(title="One step, median", title_justify="left")
    table.add_column("optimizer")
    for heading in ("clip + update", "whole step", "optimizer's share"):
        table.add_column(heading, justify="right")
    for run, rows in (("torch", torch_rows), ("fused", fused_rows)):
        timing = Timing.of(rows)
        table.add_row(
            TITLES[run], f"{timing.optimizer_ms:.2f} ms", f"{timing.step_ms:.2f} ms", f"{timing.share:.1%}"
        )
    console.print(table)

    first = differences[:SAME_PATH_STEPS]
    console.print(
        f"Largest difference of the two loss curves: {first.max():.1e} in the first {len(first)} steps "
        f"(allowed: {allowed:.0e}), {differences.max():.1e} in all {len(differences)}."
    )
    if not same:
        console.print("[bold red]The two optimizers do not follow the same curve.")
    return same


def report_hygiene(results: Results, options: Options, task: Task, console: Console) -> None:
    """Print the validation score with and without hygiene, seed by seed, and who wins, if anybody."""
    score = task.score
    table = Table(title=f"Validation {score} at the lowest validation loss", title_justify="left")
    for heading in ("seed", "hygiene", "uniform decay", "gain of hygiene"):
        table.add_column(heading, justify="right")
    scores = {
        run: [best_validation(results[run, seed])[score] for seed in options.seeds]
        for run in ("fused", "uniform")
    }
    gain = Gain.of(scores["fused"], scores["uniform"], score)
    for seed, *cells in zip(options.seeds, scores["fused"], scores["uniform"], gain.gains, strict=True):
        hygiene, uniform, difference = cells
        table.add_row(str(seed), f"{hygiene:.3f}", f"{uniform:.3f}", f"{difference:+.3f}")
    if gain.spread is not None:
        table.add_section()
        table.add_row(
            "mean", *(f"{sum(cells) / len(cells):.3f}" for cells in scores.values()), f"{gain.mean:+.3f}"
        )
        table.add_row(
            "spread",
            *(f"{torch.tensor(cells).std():.3f}" for cells in scores.values()),
            f"{gain.spread:.3f}",
        )
    console.print(table)
    console.print(gain.verdict())


def report_precisions(results: Results, options: Options, score: str, console: Console) -> None:
    """Print score and bytes of each precision, and what the first one's spread from seed to seed is."""
    table = Table(title=f"Validation {score} at the lowest validation loss", title_justify="left")
    table.add_column("precision", no_wrap=True)
    headings = ["bytes", *(f"seed {seed}" for seed in options.seeds), "mean", "spread"]
    for heading in (*headings, f"gain over {options.precisions[0]}"):
        table.add_column(heading, justify="right")
    scores = {
        run: [best_validation(results[run, seed])[score] for seed in options.seeds]
        for run in options.precisions
    }
    first = scores[options.precisions[0]]
    for run, mine in scores.items():
        gain = Gain.of(mine, first, score)
        mean_gain = f"{gain.mean:+.3f}"
        if gain.interval is not None:
            mean_gain += " ({:+.3f} to {:+.3f})".format(*gain.interval)
        table.add_row(
            run,
            f"{results[run, options.seeds[0]][-1]['bytes_per_parameter']:.2f}",
            *(f"{value:.3f}" for value in mine),
            f"{sum(mine) / len(mine):.3f}",
            f"{torch.tensor(mine).std():.3f}" if len(mine) > 1 else "–",
            "–" if mine is first else mean_gain,
        )
    console.print(table)
    for run in options.precisions:
        console.print(f"{run}: {PRECISIONS[run].title}")
    console.print(
        "Bytes: of a parameter and its state, without its gradient. Spread: between seeds. Gain: mean, and "
        "in brackets its 95 % interval; one that includes 0 says that seeds explain the difference."
    )


def report_averages(results: Results, score: str, console: Console) -> None:
    """Print the validation score with the weights and with their averages, each at its lowest loss."""
    table = Table(title=f"Validation {score} at the lowest validation loss of each", title_justify="left")
    for heading in ("run", "seed"):
        table.add_column(heading)
    for heading in ("weights", "averages"):
        table.add_column(heading, justify="right")
    for (run, seed), rows in results.items():
        if "ema_val_loss" in rows[0]:
            plain, averaged = best_validation(rows)[score], best_validation(rows, "ema_val_loss")
            table.add_row(run, str(seed), f"{plain:.3f}", f"{averaged[f'ema_{score}']:.3f}")
    console.print(table)


def report_besides(results: Results, options: Options, score: str, console: Console) -> None:
    """Print, and draw, what was asked for of averages, guard and statistics."""
    settings = options.settings
    if settings.ema is not None:
        console.print()
        report_averages(results, score, console)
    if settings.guard is not None:
        skipped = {key: rows[-1].get("skipped_steps", 0) for key, rows in results.items()}
        told = [f"{n} of {run}, seed {seed}" for (run, seed), n in skipped.items() if n]
        console.print(f"\nSteps skipped by the guard: {', '.join(told) or 'none'}.")
    if settings.stats:
        first = {run: rows for (run, seed), rows in results.items() if seed == options.seeds[0]}
        drawn = {run: rows for run, rows in first.items() if ratios_by_role(rows)}
        picture = options.out / "ratios.png"
        if options.ranks.first:
            title = f"How large updates are beside the parameters: {options.model}, seed {options.seeds[0]}"
            draw_ratios(drawn, title, picture)
        console.print(f"\npicture: {picture}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fused_adamw").setLevel(logging.INFO if options.ranks.first else logging.WARNING)
    if options.settings.device.startswith("cuda"):  # so that the optimizer is all that differs between runs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    with joined(options.ranks, options.settings.device):
        try:
            return compare_runs(options)
        except (RefusedError, checkpoints.CheckpointError) as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            return 2


def compare_runs(options: Options) -> int:
    """Make all runs and report on them; return the exit status.

    Raises:
        RefusedError: What was asked for cannot be done.
        CheckpointError: A checkpoint cannot be written.
    """
    console = Console(highlight=False)
    task = load_task(options)
    resumed = find_checkpoints(options, task)

    settings = options.settings
    console.print(
        f"{options.model} on {task.data.description}, {settings.max_steps} steps, {settings.device}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    path = options.out / "metrics.jsonl" if options.ranks.first else Path(os.devnull)
    with path.open("w") as metrics:
        for run, seed in planned_runs(options):
            trainer = Trainer(run, seed, task, settings, options.ranks)
            if (run, seed) in resumed:
                trainer.load_state_dict(
                    checkpoints.load(resumed[run, seed], identity(run, seed, task, settings))
                )
            results[run, seed] = train(trainer, options, metrics)

    console.print()
    if options.precisions:
        report_precisions(results, options, task.score, console)
        status = 0
    else:
        status = report_optimizers(results, options, task, console)
    report_besides(results, options, task.score, console)
    console.print(f"\nmetrics: {metrics.name}")
    return status


def report_optimizers(results: Results, options: Options, task: Task, console: Console) -> int:
    """Print and draw what the runs say about the optimizers; return 1 if the two part, else 0."""
    first, allowed = options.seeds[0], tolerance(options.settings.amp)
    same = report_path(results, first, allowed, console)
    console.print()
    report_hygiene(results, options, task, console)
    picture = options.out / "curves.png"
    if options.ranks.first:
        draw_picture(
            {run: results[run, first] for run in TITLES},
            allowed,
            options.settings.clip,
            f"{options.model} on {task.data.description}, seed {first}",
            picture,
        )
    console.print(f"\npicture: {picture}")
    return 0 if same else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the last checkpoint, if --checkpoint made one")
        raise SystemExit(130) from None
