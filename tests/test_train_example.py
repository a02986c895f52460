"""The main job, examples/train.py: the comparison it makes, and every option it takes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoints  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402
import recipes  # noqa: E402
import schedules  # noqa: E402
import train  # noqa: E402

GPT = ["--model=gpt", "--layers=1", "--heads=2", "--width=16", "--context=16", f"--data={EXAMPLES}"]
GPT += ["--batch-size=4", "--max-steps=12", "--seeds=1"]
CNN = ["--model=cnn", "--blocks=1", "--channels=4", "--batch-size=16", "--max-steps=12", "--seeds=1"]
TINY = {"gpt": GPT, "cnn": CNN}
SCORES = {"gpt": {"perplexity", "token_accuracy"}, "cnn": {"accuracy"}}
TIMES = {"seconds", "step_ms", "optimizer_ms"}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower with two threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run the command line in this process, without the picture; return its status and its metrics."""
    monkeypatch.setattr(train, "draw_picture", lambda *args: None)

    def run(*argv, out=tmp_path / "out"):
        status = train.main([*argv, f"--out={out}"])
        return status, read_metrics(out)

    return run


def read_metrics(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def trainer(*argv, run="fused"):
    """Build a trainer as the command line would."""
    chosen = options.parse(argv)
    return loop.Trainer(run, chosen.seeds[0], train.load_task(chosen), chosen.settings)


def losses(rows, run=None):
    return [row["train_loss"] for row in rows if run in (None, row["run"])]


# The comparison


@pytest.mark.parametrize("model", TINY)
def test_both_optimizers_follow_the_same_curve(job, model, capsys):
    status, rows = job(*TINY[model])
    assert status == 0
    assert [row["run"] for row in rows] == ["torch"] * 12 + ["fused"] * 12 + ["uniform"] * 12
    assert losses(rows, "fused") == pytest.approx(losses(rows, "torch"), abs=1e-4)
    assert losses(rows, "fused") != losses(rows, "uniform")
    assert losses(rows, "fused")[-1] < losses(rows, "fused")[0] - 0.1, "nothing was learned"
    said = capsys.readouterr().out
    assert "Largest difference of the two loss curves" in said
    assert "optimizer's share" in said
    assert f"Validation {loop.Task(trainer(*TINY[model]).task.config, None).score}" in said
    assert "One seed shows no spread" in said


@pytest.mark.parametrize("model", TINY)
def test_metrics_have_the_promised_fields(job, model):
    _, rows = job(*TINY[model], "--eval-every=5")
    validated = SCORES[model] | {"val_loss", "bytes_per_parameter"}
    always = {"step", "run", "seed", "train_loss", "learning_rate", "grad_norm", "param_norm"} | TIMES
    for row in rows:
        assert row.keys() == always | validated
        assert all(row[name] is not None for name in always)
        at_validation = row["step"] in (5, 10, 12)
        assert all((row[name] is not None) == at_validation for name in validated)
        assert 0 < row["optimizer_ms"] < row["step_ms"]
        if model == "gpt" and at_validation:
            assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))
    for run in recipes.TITLES:
        seconds = [row["seconds"] for row in rows if row["run"] == run]
        assert seconds == sorted(seconds)


def test_an_optimizer_that_strays_fails_the_job(job, monkeypatch, capsys):
    class Strays(recipes.FusedHygieneAdamW):
        def __init__(self, params, *, lr, **others):
            super().__init__(params, lr=1.01 * lr, **others)

    monkeypatch.setattr(recipes, "FusedHygieneAdamW", Strays)
    status, _ = job(*GPT)
    assert status == 1
    assert "do not follow the same curve" in capsys.readouterr().out


def test_a_loss_that_is_no_number_is_never_the_same_curve():
    nan = [{"train_loss": math.nan}] * 3
    assert not compare.same_path(compare.loss_differences(nan, nan), allowed=1e-4)


def test_metrics_stay_json_when_training_diverges():
    row = compare.jsonable({"step": 1, "train_loss": math.nan, "grad_norm": math.inf, "val_loss": None})
    assert row == {"step": 1, "train_loss": None, "grad_norm": None, "val_loss": None}


def test_the_gradient_norm_is_the_one_before_the_clip(job):
    _, clipped = job(*GPT, "--clip=0.01")
    _, free = job(*GPT, "--clip=inf")
    first = [row["grad_norm"] for row in clipped + free if row["step"] == 1]
    assert first == pytest.approx([first[0]] * 6, rel=1e-5)
    assert first[0] > 0.1
    assert losses(clipped, "fused") == pytest.approx(losses(clipped, "torch"), abs=1e-4)
    assert losses(clipped, "fused")[-1] != losses(free, "fused")[-1]


def test_more_seeds_repeat_what_hygiene_is_judged_by(job, capsys):
    _, rows = job(*GPT, "--max-steps=3", "--seed=4", "--seeds=2")
    runs = dict.fromkeys((row["run"], row["seed"]) for row in rows)
    assert list(runs) == [("torch", 4), ("fused", 4), ("uniform", 4), ("fused", 5), ("uniform", 5)]
    said = capsys.readouterr().out
    assert "spread" in said
    assert "95 %" in said


def test_nobody_wins_within_the_spread_of_the_seeds():
    one = compare.Gain.of([6.0], [7.0], "perplexity")
    assert one.gains == (1.0,)
    assert one.spread is None
    assert "says nothing" in one.verdict()
    noise = compare.Gain.of([6.0, 7.0, 6.5], [7.0, 6.0, 6.4], "perplexity")
    assert noise.verdict().startswith("No winner")
    clear = compare.Gain.of([6.0, 7.0, 6.5], [7.0, 8.1, 7.4], "perplexity")
    assert clear.verdict().startswith("Hygiene is better")
    worse = compare.Gain.of([0.90, 0.91, 0.92], [0.95, 0.96, 0.975], "accuracy")
    assert worse.verdict().startswith("Uniform decay is better")


@pytest.mark.parametrize("model", TINY)
def test_quick_makes_a_picture(model, tmp_path, capsys):
    sizes = {"gpt": ["--layers=1", "--width=16"], "cnn": ["--blocks=1", "--channels=4"]}[model]
    assert train.main([f"--model={model}", "--quick", *sizes, f"--out={tmp_path}"]) == 0
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    assert (width, height) == (1800, 1140)
    assert len(picture) > 50_000, "an empty picture"
    assert len(read_metrics(tmp_path)) == 3 * options.QUICK_STEPS
    said = capsys.readouterr()
    assert "fused, seed 0: 100%" in said.err
    if model == "cnn":
        assert "72 handwritten digits" in said.out


# Checkpoints


@pytest.mark.parametrize(
    "extra",
    [
        ["--dropout=0.2", "--patience=9"],
        ["--schedule=onecycle", "--accumulate=2", "--amp=fp16"],
    ],
    ids=["dropout", "onecycle-accumulate-fp16"],
)
def test_a_resumed_run_continues_the_same_curve(job, tmp_path, monkeypatch, extra):
    argv = [*GPT, *extra, "--checkpoint=5"]
    _, whole = job(*argv, out=tmp_path / "whole")

    take_step = loop.Trainer._train_step

    def interrupted(self):
        if (self.run, self.step) == ("fused", 8):
            raise KeyboardInterrupt
        return take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job(*argv)
    written = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert written == ["fused-seed0.pt", "torch-seed0.pt"]

    _, resumed = job(*argv, "--resume")
    for row in whole + resumed:
        for name in TIMES:
            del row[name]
    assert resumed == whole

    ends = [
        torch.load(tmp_path / folder / "checkpoints" / "fused-seed0.pt", weights_only=True)
        for folder in ("whole", "out")
    ]
    torch.testing.assert_close(*(end["model"] for end in ends), rtol=0, atol=0)
    for name in ("best_loss", "evaluations_since_best", "scaler", "position"):
        assert ends[0][name] == ends[1][name], name


def test_a_checkpoint_holds_all_that_the_rest_depends_on(job, tmp_path):
    job(*GPT, "--amp=fp16", "--checkpoint=100")
    state = torch.load(tmp_path / "out" / "checkpoints" / "fused-seed0.pt", weights_only=True)
    assert state["step"] == 12
    assert state["best_loss"] == min(row["val_loss"] for row in state["history"] if row["val_loss"])
    assert state.keys() >= {"model", "optimizer", "scheduler", "scaler", "position"}
    assert state["scaler"]["scale"] > 1


def test_a_checkpoint_of_another_model_is_refused_by_name(job, tmp_path, capsys):
    job(*GPT, "--checkpoint")
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert train.main([*GPT, "--width=32", "--lr=0.5", f"--out={tmp_path / 'out'}", "--resume"]) == 2
    said = capsys.readouterr().err
    assert "width is 16 there and 32 here" in said
    assert "lr is 0.006 there and 0.5 here" in said
    assert "layers" not in said
    assert "--force-fresh" in said
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == metrics

    assert train.main([*GPT, f"--out={tmp_path / 'out'}"]) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err

    status, rows = job(*GPT, "--width=32", "--force-fresh")
    assert status == 0
    assert len(rows) == 36
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_a_resumed_run_can_go_on_longer(job, schedule):
    _, short = job(*GPT, f"--schedule={schedule}", "--warmup=2", "--checkpoint")
    status, rows = job(*GPT, f"--schedule={schedule}", "--warmup=2", "--max-steps=20", "--resume")
    assert status == 0
    fused = [row for row in rows if row["run"] == "fused"]
    assert [row["step"] for row in fused] == list(range(1, 21))
    assert losses(fused)[:12] == losses(short, "fused")
    _, whole = job(*GPT, f"--schedule={schedule}", "--warmup=2", "--max-steps=20", "--force-fresh")
    rates = [row["learning_rate"] for row in whole if row["run"] == "fused"]
    assert [row["learning_rate"] for row in fused][12:] == pytest.approx(rates[12:])


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
    assert train.main([*GPT, f"--out={tmp_path}", "--resume"]) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


def test_a_broken_checkpoint_is_refused(tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoints.CheckpointError, match=r"broken\.pt cannot be read"):
        checkpoints.load(path, {})


# Schedules


def rates(schedule, warmup=10, total=100, lr=1e-3):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = schedules.build_scheduler(optimizer, schedule, lr, warmup, total)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return np.array(values), optimizer.param_groups[0]["lr"] / lr


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_every_schedule_rises_from_a_tenth_and_falls(schedule):
    values, after = rates(schedule)
    assert values[0] == pytest.approx(0.1)
    assert values.argmax() == 10
    assert values[10] == pytest.approx(1)
    assert (np.diff(values[:11]) > 0).all()
    assert (np.diff(values[10:]) < 0).all()
    end = {"cosine": 0, "linear": 0, "onecycle": 1e-4, "noam": math.sqrt(10 / 100)}[schedule]
    assert after == pytest.approx(end, abs=1e-9)


def test_the_schedules_differ_in_shape():
    assert rates("linear")[0][55] == pytest.approx(0.5)
    assert rates("cosine")[0][55] == pytest.approx(0.5)
    assert rates("cosine")[0][32] > rates("linear")[0][32] > rates("noam")[0][32]
    rise = rates("onecycle")[0][:11]
    assert rise[2] < rates("linear")[0][2], "onecycle's rise is a cosine, the warmup's a line"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "noam"])
def test_no_warmup_starts_at_the_full_rate(schedule):
    values, _ = rates(schedule, warmup=0)
    assert values[0] == 1
    assert values.max() == 1


def test_training_starts_at_a_tenth_of_the_rate(job):
    _, rows = job(*GPT, "--warmup=4", "--lr=0.01")
    fused = [row["learning_rate"] for row in rows if row["run"] == "fused"]
    assert fused[:5] == pytest.approx([0.001, 0.00325, 0.0055, 0.00775, 0.01])


# The other options


def test_patience_stops_when_validation_gets_no_better(monkeypatch):
    measured = iter([3.0, 2.0, 2.5, 1.9, 2.1, 1.9, 2.2, 0.1])
    monkeypatch.setattr(loop.Trainer, "_evaluate", lambda self, split: (next(measured), 0.5))
    stopped = trainer(*GPT, "--eval-every=1", "--patience=3")
    assert len(list(stopped.rows())) == 7
    assert stopped.best_loss == 1.9
    assert not list(stopped.rows())


def test_early_stopping_ends_the_run(job, monkeypatch, capsys):
    monkeypatch.setattr(loop.Trainer, "_evaluate", lambda self, split: (1.0, 0.5))
    status, rows = job(*GPT, "--eval-every=2", "--patience=2")
    assert status == 0
    assert max(row["step"] for row in rows) == 6
    assert "stopped at step 6" in capsys.readouterr().out


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("amp", loop.AMP_DTYPES)
def test_mixed_precision_trains(job, model, amp):
    status, rows = job(*TINY[model], f"--amp={amp}")
    assert status == 0
    full = trainer(*TINY[model])
    list(full.rows())
    assert losses(rows, "fused") != losses(full.history)
    assert losses(rows, "fused") == pytest.approx(losses(full.history), abs=0.2)
    # The norm is that of the gradients without the loss scale.
    assert rows[12]["grad_norm"] == pytest.approx(full.history[0]["grad_norm"], rel=0.1)


def test_accumulated_batches_equal_a_big_batch():
    small = trainer(*GPT, "--batch-size=4", "--accumulate=2")
    big = trainer(*GPT, "--batch-size=8")
    assert losses(small.rows()) == pytest.approx(losses(big.rows()), abs=1e-5)
    assert small.position == 2 * big.position


@pytest.mark.parametrize("model", TINY)
def test_gradient_checkpointing_changes_memory_not_results(model):
    plain = list(trainer(*TINY[model], "--dropout=0.1").rows())
    saving = trainer(*TINY[model], "--dropout=0.1", "--gradient-checkpointing")
    recomputed = 0

    def count(module, inputs, output):
        nonlocal recomputed
        recomputed += 1

    saving.model.blocks[0].register_forward_hook(count)
    rows = list(saving.rows())
    assert recomputed > 2 * len(rows), "no activation was recomputed"
    assert losses(rows) == losses(plain)
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in plain]


def test_label_smoothing_is_of_the_training_loss_alone():
    smoothed = trainer(*GPT, "--label-smoothing=0.2", "--max-steps=1")
    inputs, targets = smoothed.batches[0]
    with torch.no_grad():
        log_probabilities = F.log_softmax(smoothed.model(inputs), -1)
    right = log_probabilities.gather(-1, targets.long().unsqueeze(-1)).mean()
    expected = -(0.8 * right + 0.2 * log_probabilities.mean())
    (row,) = smoothed.rows()
    assert row["train_loss"] == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        smoothed.model.eval()
        split = smoothed.task.data.validation
        logits = smoothed.model(split.inputs)
    plain = F.cross_entropy(logits.flatten(0, 1), split.targets.flatten().long())
    assert row["val_loss"] == pytest.approx(float(plain), rel=1e-4)
    right = (logits.argmax(-1) == split.targets).float().mean()
    assert row["token_accuracy"] == pytest.approx(float(right), abs=1e-3)


def test_dropout_is_for_training_alone():
    plain, dropped = trainer(*GPT, "--max-steps=1"), trainer(*GPT, "--max-steps=1", "--dropout=0.5")
    split = plain.task.data.validation
    assert plain._evaluate(split) == dropped._evaluate(split)
    assert losses(plain.rows()) != losses(dropped.rows())


def test_weight_decay_is_handed_on():
    none, strong = (trainer(*CNN, f"--weight-decay={decay}", "--lr=0.01") for decay in (0, 10))
    assert list(none.rows())[-1]["param_norm"] > list(strong.rows())[-1]["param_norm"]


def test_the_backend_is_handed_on():
    assert trainer(*GPT, "--backend=reference").recipe.optimizer.backend == "reference"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr=nan"], "--lr: nan is not above 0"),
        (["--lr=inf"], "--lr: inf is not finite"),
        (["--clip=0"], "--clip: 0 is not above 0"),
        (["--weight-decay=-1"], "--weight-decay: -1 is not"),
        (["--dropout=1"], "--dropout: 1 is not"),
        (["--label-smoothing=-0.1"], "--label-smoothing: -0.1 is not"),
        (["--max-steps=0"], "--max-steps: 0 is below 1"),
        (["--accumulate=x"], "--accumulate: invalid"),
        (["--schedule=step"], "invalid choice: 'step'"),
        (["--amp=int8"], "invalid choice: 'int8'"),
        (["--warmup=12"], "--warmup 12 leaves none of the --max-steps 12"),
        (["--schedule=onecycle", "--warmup=0"], "--warmup 1"),
        (["--width=15"], "--width 15 cannot be divided among --heads 2"),
        (["--channels=8"], "--channels is a size of --model cnn"),
        (["--data=nowhere"], "--data nowhere does not exist"),
        (["--device=nothing"], "'nothing' cannot be used here"),
        (["--backend=nothing"], "--backend: unknown backend 'nothing'"),
        (["--resume", "--force-fresh"], "give one of them"),
    ],
)
def test_bad_options_are_refused(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        train.main([*GPT, f"--out={tmp_path / 'out'}", *argv])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_is_refused_for_the_digits(capsys):
    with pytest.raises(SystemExit):
        options.parse([*CNN, "--data=."])
    assert "--data is text for --model gpt" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [("abc", "too few"), ("x" * 400, "a batch of 99 is more than")])
def test_too_little_data_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "text").write_text(text)
    argv = [*GPT, f"--data={tmp_path / 'text'}", "--batch-size=99", f"--out={tmp_path / 'out'}"]
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The data


def test_the_standard_library_is_read_in_a_fixed_order_without_tests():
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    files = data.python_files(root)
    assert files == data.python_files(root)
    assert root / "argparse.py" in files
    assert not any({"test", "site-packages"} & set(file.relative_to(root).parts) for file in files)


def test_text_is_split_and_every_byte_is_answered_by_the_next(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    (tmp_path / "b.txt").write_bytes(bytes(range(200)))
    whole = data.text_data(tmp_path, context=8)
    assert torch.equal(whole.train.inputs[1], torch.arange(8, 16, dtype=torch.uint8))
    assert torch.equal(whole.train.targets[1], torch.arange(9, 17, dtype=torch.uint8))
    assert len(whole.train) == (360 - 1) // 8
    assert whole.validation.inputs[0, 0] == 160
    half = data.text_data(tmp_path, context=8, share=0.5)
    assert len(half.train) == (180 - 1) // 8
    assert torch.equal(half.validation.inputs, whole.validation.inputs)


def test_an_epoch_of_batches_shows_every_example_once():
    split = data.Split(torch.arange(12), torch.arange(12))
    batches = data.Batches(split, batch_size=4, seed=0)
    epochs = [[batches[epoch * 3 + index][0] for index in range(3)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
    assert torch.equal(batches[2][0], epochs[0][2]), "a batch depends on its position alone"
    assert batches[0][0].tolist() != data.Batches(split, 4, seed=1)[0][0].tolist()
