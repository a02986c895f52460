"""The example with averages, the guard and statistics: what is asked for, logged, drawn, saved."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import loop  # noqa: E402
import options  # noqa: E402
import plotting  # noqa: E402
import train  # noqa: E402

from fused_adamw import EMA, SpikeGuard  # noqa: E402

GPT = ["--model=gpt", "--layers=1", "--heads=2", "--width=16", "--context=16", f"--data={EXAMPLES}"]
GPT += ["--batch-size=4", "--max-steps=12", "--seeds=1", "--eval-every=5"]
CNN = ["--model=cnn", "--blocks=1", "--channels=4", "--batch-size=16", "--max-steps=12", "--seeds=1"]
# So few norms, under a rate that rises, are far from each other: a spike is one that is much farther.
ALL = ["--ema=0.8", "--guard=50", "--stats"]
TIMES = ("seconds", "step_ms", "optimizer_ms")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def trainer(*argv, run="fused"):
    """Build a trainer as the command line would."""
    chosen = options.parse(argv)
    return loop.Trainer(run, chosen.seeds[0], train.load_task(chosen), chosen.settings)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize("model", [GPT, CNN], ids=["gpt", "cnn"])
def test_all_of_it_beside_the_comparison(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert train.main([*model, *ALL, f"--out={tmp_path}"]) == 0
    rows = metrics(tmp_path)
    by_run = {run: [row for row in rows if row["run"] == run] for run in ("torch", "fused", "uniform")}
    assert not any(name.startswith(("ema_", "optim/", "skipped")) for row in by_run["torch"] for name in row)
    for row in by_run["fused"] + by_run["uniform"]:
        assert row["skipped_steps"] == 0
        assert (row["ema_val_loss"] is None) == (row["val_loss"] is None)
        assert 0 < row["optim/update_ratio/group 0"] < 1
        assert row["optim/grad_norm"] == pytest.approx(row["grad_norm"])
    said = capsys.readouterr().out
    score = "perplexity" if model is GPT else "accuracy"
    assert by_run["fused"][-1]["val_loss"] != by_run["fused"][-1]["ema_val_loss"]
    lowest = {
        kind: min((row for row in by_run["fused"] if row["val_loss"] is not None), key=lambda row: row[kind])
        for kind in ("val_loss", "ema_val_loss")
    }
    (line,) = [line for line in said.splitlines() if line.startswith("│ fused ")]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    best = lowest["val_loss"][score], lowest["ema_val_loss"][f"ema_{score}"]
    assert cells == ["fused", "0", *(f"{value:.3f}" for value in best)]
    assert "Steps skipped by the guard: none." in said
    for name in ("curves.png", "ratios.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_the_optimizer_is_asked_for():
    optimizer = trainer(*GPT, *ALL).recipe.optimizer
    assert optimizer.ema == EMA(0.8, warmup="timm")
    assert optimizer.guard == SpikeGuard(50.0)
    assert optimizer.stats
    optimizer = trainer(*GPT, "--ema", "--guard").recipe.optimizer
    assert (optimizer.ema.decay, optimizer.guard.sigmas) == (options.EMA_DECAY, options.GUARD_SIGMAS)
    plain = trainer(*GPT).recipe.optimizer
    assert (plain.ema, plain.guard, plain.stats) == (None, None, False)


def test_watching_changes_no_curve():
    assert [row["train_loss"] for row in trainer(*GPT, *ALL).rows()] == [
        row["train_loss"] for row in trainer(*GPT).rows()
    ]


def test_validation_with_the_averages():
    """The metrics are those of a model that has the averages."""
    made = trainer(*GPT, "--ema=0.8")
    *_, last = made.rows()
    before = [p.detach().clone() for p in made.model.parameters()]
    other = trainer(*GPT)
    other.model.load_state_dict(made.recipe.optimizer.ema_state_dict(made.model))
    assert other._evaluate(other.task.data.validation)[0] == last["ema_val_loss"]
    assert last["ema_val_loss"] != last["val_loss"]
    assert all(torch.equal(p, q) for p, q in zip(before, made.model.parameters(), strict=True))


def test_what_is_logged_has_a_bound():
    """As many entries, whatever the number of steps; as many series, whatever the number of parameters."""
    logged = [
        [name for name in row if name.startswith("optim/")]
        for row in trainer(*GPT, "--stats", "--max-steps=205", "--eval-every=500").rows()
    ]
    assert [i + 1 for i, names in enumerate(logged) if names] == list(range(2, 206, 2))
    names = dict(trainer(*GPT).model.named_parameters())
    assert len(names) > 10
    of_parameters = [sum(f"optim/grad_norm/{name}" in row for name in names) for row in logged if row]
    assert of_parameters == [3] * len(of_parameters)


def disturbed(made, step, factor):
    """Multiply the gradients of one step, as a bad batch would."""
    take_step = made.recipe.step

    def step_after(scaler, loss):
        if made.step == step:
            for p in made.model.parameters():
                p.grad *= factor
        return take_step(scaler, loss)

    made.recipe.step = step_after
    return made


@pytest.mark.parametrize("factor", [1e4, math.nan])
def test_a_spike_is_skipped(factor, monkeypatch):
    monkeypatch.setattr(loop, "SpikeGuard", lambda sigmas: SpikeGuard(sigmas, window=8, warmup=4))
    made = disturbed(trainer(*GPT, "--guard=50", "--clip=inf"), 8, factor)
    rows = list(made.rows())
    assert [row["skipped_steps"] for row in rows] == [0] * 8 + [1] * 4
    assert rows[8]["param_norm"] == rows[7]["param_norm"]


@pytest.mark.parametrize("run", ["fused", "uniform", "bf16-split"])
def test_a_resumed_run_has_the_same_bits(run, tmp_path, monkeypatch):
    """With averages and with a history that decides: a spike comes after the interruption."""
    monkeypatch.setattr(loop, "SpikeGuard", lambda sigmas: SpikeGuard(sigmas, window=8, warmup=4))
    argv = [*GPT, *ALL, *(["--precision"] if run == "bf16-split" else [])]
    whole = disturbed(trainer(*argv, run=run), 7, 1e4)
    expected = untimed(whole.rows())
    assert expected[-1]["skipped_steps"] == 1

    first = trainer(*argv, run=run)
    rows = first.rows()
    for _ in range(6):
        next(rows)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = disturbed(trainer(*argv, run=run), 7, 1e4)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    list(second.rows())
    assert untimed(second.history) == expected
    ends = whole.state_dict(), second.state_dict()
    for ours, theirs in zip(*([end["model"], end["optimizer"]["state"]] for end in ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(ends[1]["guard"]["status"], ends[0]["guard"]["status"], rtol=0, atol=0)


def test_a_checkpoint_without_averages_is_refused_by_name(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert train.main([*GPT, "--max-steps=2", "--checkpoint", out]) == 0
    assert train.main([*GPT, "--max-steps=2", "--resume", "--ema", "--stats", out]) == 2
    said = capsys.readouterr().err
    assert "ema is None there and 0.99 here" in said
    assert "stats" not in said, "a resumed run may be watched more closely"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ema=1"], "--ema: 1 is not at least 0 and below 1"),
        (["--guard=0"], "--guard: 0 is not above 0"),
        (["--guard=inf"], "--guard: inf is not finite"),
    ],
)
def test_bad_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        options.parse([*GPT, *argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_ratios_are_drawn_for_each_run_by_role(tmp_path):
    rows = [
        {"step": step, **{f"optim/update_ratio/role {role}": 10.0**-i for i, role in enumerate("ab")}}
        for step in (1, 5)
    ]
    rows.insert(1, {"step": 2})
    assert plotting.ratios_by_role(rows) == {"a": ([1, 5], [1.0, 1.0]), "b": ([1, 5], [0.1, 0.1])}
    plotting.draw_ratios({"one": rows, "two": rows}, "title", tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
