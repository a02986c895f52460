"""The Trainer of transformers: its loop, its scheduler, its clipping and logging."""

import warnings

import pytest
import torch

from fused_adamw import FusedHygieneAdamW

from .loops import (
    BATCH_SIZE,
    CLIP,
    LR,
    WEIGHT_DECAY,
    Model,
    assert_norms_before_clipping,
    assert_same,
    dataset,
    run_snippet,
    torch_adamw,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

OPTIONS = {
    "per_device_train_batch_size": BATCH_SIZE,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}


def options(**more):
    """Arguments of TrainingArguments, without those that this version does not have."""
    known = transformers.TrainingArguments.__dataclass_fields__
    return {key: value for key, value in {**OPTIONS, **more}.items() if key in known}


def run(number, **more):
    return run_snippet(
        "HF Trainer",
        number,
        options=options(**more),
    )


def train_torch(clip, build=torch_adamw, **more):
    """The Trainer with torch's AdamW and its own clipping."""
    model = Model()
    args = transformers.TrainingArguments(max_grad_norm=clip or 0.0, **options(**more))
    trainer = transformers.Trainer(model, args, train_dataset=dataset(), optimizers=(build(model), None))
    trainer.train()
    return model, trainer


def grad_norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "cosine"}], ids=str
)
def test_optimizers_argument(more):
    names = run(0, **more)
    assert_same(names["model"], lambda clip: train_torch(clip, **more)[0])


def test_optimizer_cls_and_kwargs():
    names = run(1)
    assert_same(names["model"], lambda clip: train_torch(clip)[0])
    assert len(names["trainer"].optimizer.param_groups) == 2


def test_optimizer_cls_without_the_model_has_the_groups_of_the_trainer():
    model = Model()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(max_grad_norm=0.0, weight_decay=WEIGHT_DECAY, **options()),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(FusedHygieneAdamW, {"lr": LR, "max_grad_norm": CLIP}),
    )
    trainer.train()
    groups = trainer.optimizer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [WEIGHT_DECAY, 0.0]

    def build(peer):
        ours = {id(p): q for p, q in zip(model.parameters(), peer.parameters(), strict=True)}
        return torch.optim.AdamW(
            [
                {"params": [ours[id(p)] for p in group["params"]], "weight_decay": group["weight_decay"]}
                for group in groups
            ],
            lr=LR,
        )

    assert_same(model, lambda clip: train_torch(clip, build)[0])


def test_lean_trainer_logs_the_same_norm_without_another_pass(monkeypatch):
    _, peer = train_torch(CLIP)
    passes = []
    measure = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda *args, **kwargs: passes.append(1) or measure(*args, **kwargs),
    )
    from accelerate import Accelerator

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(
        Accelerator, "clip_grad_norm_", lambda *args, **kwargs: passes.append(1) or clip(*args, **kwargs)
    )
    names = run(2)
    assert not passes
    run(0)
    assert passes  # the Trainer's own way to log it: what LeanTrainer saves
    logged = grad_norms(names["trainer"])
    assert_norms_before_clipping(logged, 12)
    # Two chains of float32 steps, norms of gradients of order 10.
    assert logged == pytest.approx(grad_norms(peer), rel=1e-4)
    assert_same(names["model"], lambda clip: train_torch(clip)[0])


def test_the_default_clips_a_second_time_and_is_warned_of():
    """max_grad_norm=1.0 left as it is, where every gradient is large."""
    model = Model()
    large = [{**sample, "labels": sample["labels"] + 30.0} for sample in dataset()]
    optimizer = FusedHygieneAdamW(model, lr=LR, max_grad_norm=1.0)
    args = transformers.TrainingArguments(**options())
    trainer = transformers.Trainer(model, args, train_dataset=large, optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match=r"clipped before step\(\) too.*integrations\.md") as caught:
        trainer.train()
    assert sum("clipped before step()" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*clipped before step")
        run(0)
