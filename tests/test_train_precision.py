"""The example's comparison of precisions: what each run is asked for, and what is reported."""

from __future__ import annotations

import json
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
import recipes  # noqa: E402
import train  # noqa: E402

SMALL = ["--layers=1", "--heads=2", "--width=64", "--context=16", f"--data={EXAMPLES}"]
SMALL += ["--batch-size=4", "--max-steps=4"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def trainer(run, *argv):
    chosen = options.parse([*SMALL, *argv])
    return loop.Trainer(run, chosen.seeds[0], train.load_task(chosen), chosen.settings)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_are_compared_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    assert train.main(["--precision", *SMALL, "--seeds=2", f"--out={out}"]) == 0
    rows = metrics(out)
    assert {(row["run"], row["seed"]) for row in rows} == {
        (run, seed) for run in recipes.PRECISIONS for seed in (0, 1)
    }
    last = {row["run"]: row for row in rows if row["seed"] == 0 and row["step"] == 4}
    nbytes = {run: row["bytes_per_parameter"] for run, row in last.items()}
    assert (nbytes["fp32"], nbytes["bf16-split"], nbytes["bf16"], nbytes["bf16-stochastic"]) == (12, 8, 6, 6)
    assert 4 < nbytes["8bit"] < 6  # embeddings, norms and biases have moments of two bytes
    shown = capsys.readouterr().out
    for run in recipes.PRECISIONS:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {run} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1] == f"{nbytes[run]:.2f}"
        assert cells[2] == f"{last[run]['perplexity']:.3f}"
        assert (cells[-1] == "–") == (run == "fp32")
    assert "spread" in shown
    assert "seeds explain the difference" in " ".join(shown.split())


def test_single_ones_may_be_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(["--precision", "bf16", "fp32", "bf16", *SMALL, "--seeds=1", f"--out={out}"]) == 0
    assert [row["run"] for row in metrics(out)] == ["bf16"] * 4 + ["fp32"] * 4
    assert not (out / "curves.png").exists()


@pytest.mark.parametrize("run", recipes.PRECISIONS)
def test_each_is_what_it_is_called(run):
    made = trainer(run, "--precision")
    assert {p.dtype for p in made.model.parameters()} == {recipes.PRECISIONS[run].dtype}
    optimizer = made.recipe.optimizer
    kept = set(optimizer._kept())
    params = {formats.param.name for formats in kept}
    expected = {
        "fp32": "float32",
        "bf16": "bfloat16",
        "bf16-split": "bfloat16_split",
        "bf16-stochastic": "bfloat16_stochastic",
        "8bit": "bfloat16_stochastic",
    }
    assert params == {expected[run]}
    assert any(formats.exp_avg_sq.name == "root_unsigned" for formats in kept) == (run == "8bit")
    assert any(formats.exp_avg_sq.name == "bfloat16" for formats in kept) == (run == "bf16")


def test_a_resumed_run_continues_the_same_curve(tmp_path):
    """In the precision with most in its state."""
    for run in ("bf16-split", "8bit"):
        whole = trainer(run, "--precision")
        expected = [row["train_loss"] for row in whole.rows()]
        first = trainer(run, "--precision")
        rows = first.rows()
        seen = [next(rows)["train_loss"], next(rows)["train_loss"]]
        torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
        second = trainer(run, "--precision")
        second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        assert seen + [row["train_loss"] for row in second.rows()] == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--precision", "--model=cnn"], "--precision is for --model gpt"),
        (["--precision", "--amp=bf16"], "and so does --amp: give one of them"),
    ],
)
def test_bad_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        options.parse(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
