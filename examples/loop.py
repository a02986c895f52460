"""The training loop: a `Trainer` is one run, yields a row of metrics per step, can be saved and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from data import Batches, Data, Split
from models import GPT, GPTConfig, ResNet, ResNetConfig
from ranks import Ranks, whole
from recipes import build_recipe, dtype_of
from schedules import build_scheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LRScheduler

from fused_adamw import EMA, FusedHygieneAdamW, SpikeGuard

#: The metrics of one step. Those of a validation are None at steps without one.
Row = dict[str, Any]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

STATS_ENTRIES = 100
STATS_PARAMETERS = 3  # that an entry names, those with the largest gradients

#: A checkpoint holds whole tensors under their names, so that any number of ranks can continue it.
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Settings:
    """How to train; with the model's sizes, the data and the seed, all that shapes a loss curve."""

    max_steps: int
    warmup: int
    eval_every: int
    batch_size: int
    lr: float
    weight_decay: float
    accumulate: int = 1
    clip: float = 1.0
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    amp: str | None = None
    patience: int | None = None
    ema: float | None = None
    guard: float | None = None
    stats: bool = False
    gradient_checkpointing: bool = False
    device: str = "cpu"
    backend: str = "auto"

    #: What a resumed run may change: how long it goes on, how it is watched, where and how it is computed.
    CHANGEABLE: ClassVar = frozenset(
        (
            *("max_steps", "warmup", "eval_every", "patience", "stats"),
            *("gradient_checkpointing", "device", "backend"),
        )
    )

    @property
    def besides(self) -> dict[str, Any]:
        """What FusedHygieneAdamW is asked for that torch's AdamW does not have."""
        return {
            "ema": None if self.ema is None else EMA(self.ema, warmup="timm"),
            "guard": None if self.guard is None else SpikeGuard(self.guard),
            "stats": self.stats,
        }

    @property
    def stats_every(self) -> int:
        """Steps from one entry of statistics to the next, so that there are about a hundred."""
        return max(1, self.max_steps // STATS_ENTRIES)


@dataclass(frozen=True)
class Task:
    """A model to train and the data to train it on."""

    config: GPTConfig | ResNetConfig
    data: Data

    @property
    def score(self) -> str:
        """Name the metric by which two runs of this task are compared."""
        return "perplexity" if isinstance(self.config, GPTConfig) else "accuracy"

    def build_model(self, gradient_checkpointing: bool) -> nn.Module:
        if isinstance(self.config, GPTConfig):
            return GPT(self.config, gradient_checkpointing)
        return ResNet(self.config, gradient_checkpointing)

    def validation_metrics(self, loss: float | None, accuracy: float | None) -> Row:
        if self.score == "accuracy":
            return {"val_loss": loss, "accuracy": accuracy}
        perplexity = None if loss is None else torch.tensor(loss, dtype=torch.float64).exp().item()
        return {"val_loss": loss, "perplexity": perplexity, "token_accuracy": accuracy}


def identity(run: str, seed: int, task: Task, settings: Settings) -> dict[str, Any]:
    """Describe a run by all that must stay the same when it is resumed."""
    return {
        "run": run,
        "seed": seed,
        "model": type(task.config).__name__.removesuffix("Config"),
        **asdict(task.config),
        "data": task.data.fingerprint,
        **{name: value for name, value in asdict(settings).items() if name not in Settings.CHANGEABLE},
    }


class Trainer:
    """One run: a model, its optimizer and schedule, and the history of its metrics."""

    def __init__(
        self, run: str, seed: int, task: Task, settings: Settings, ranks: Ranks | None = None
    ) -> None:
        self.run = run
        self.seed = seed
        self.task = task
        self.settings = settings
        self.ranks = ranks or Ranks()
        self.device = torch.device(settings.device)
        self.step = 0
        self.position = 0  # in the data, counted in batches
        self.best_loss = math.inf
        self.evaluations_since_best = 0
        self.history: list[Row] = []

        torch.manual_seed(seed)  # initial weights: the same in every run of a seed, and on every rank
        self.model = task.build_model(settings.gradient_checkpointing).to(self.device, dtype_of(run))
        self.forward = self.ranks.wrap(self.model)
        self.recipe = build_recipe(
            run,
            self.model,
            settings.lr,
            settings.weight_decay,
            settings.clip,
            settings.backend,
            **settings.besides,
        )
        optimizer = self.recipe.optimizer
        self.ours = optimizer if isinstance(optimizer, FusedHygieneAdamW) else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.scheduler = self._scheduler(start=0)
        self.batches = Batches(task.data.train, settings.batch_size, seed)

    def rows(self) -> Iterator[Row]:
        """Train to the last step, or until validation stops improving; yield the metrics of each step."""
        while self.step < self.settings.max_steps and not self.out_of_patience:
            row = self._train_step()
            last = self.step == self.settings.max_steps
            if last or self.step % self.settings.eval_every == 0:
                row |= self._validate()
            self.history.append(row)
            yield row

    @property
    def out_of_patience(self) -> bool:
        """Whether validation has not improved for as long as the settings allow."""
        patience = self.settings.patience
        return patience is not None and self.evaluations_since_best >= patience

    def bytes_per_parameter(self) -> float:
        """Return what parameters and optimizer state take, without step counts and gradients; locally."""
        optimizer = self.recipe.optimizer  # FSDP2 may show other parameters of the model, whole ones
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kept = [t for p in params for key, t in optimizer.state.get(p, {}).items() if key != "step"]
        local = [getattr(t, "_local_tensor", t) for t in (*params, *kept)]
        values = sum(t.numel() for t in local[: len(params)])
        return sum(t.numel() * t.element_size() for t in local) / values

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, in types that load with `weights_only=True`.

        All ranks take part; the first one's is the checkpoint.
        """
        model, optimizer = get_state_dict(self.model, self.recipe.optimizer, options=GATHERED)
        return {
            "identity": identity(self.run, self.seed, self.task, self.settings),
            "max_steps": self.settings.max_steps,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "position": self.position,
            "best_loss": self.best_loss,
            "evaluations_since_best": self.evaluations_since_best,
            "history": self.history,
            "guard": self.ours.guard_state_dict() if self.ours and self.ours.guard else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, on the same curve if `max_steps` is the same."""
        set_state_dict(
            self.model,
            self.recipe.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=GATHERED,
        )
        if self.ours and self.ours.guard:  # after the rest, whose loading takes an empty step
            self.ours.load_guard_state_dict(state["guard"])
        # The schedules are functions of the step: drawn anew, they also fit a run made longer or shorter.
        self.scheduler = self._scheduler(start=state["scheduler"]["last_epoch"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.position = state["position"]
        self.best_loss = state["best_loss"]
        self.evaluations_since_best = state["evaluations_since_best"]
        self.history = state["history"]

    def _scheduler(self, start: int) -> LRScheduler:
        settings = self.settings
        return build_scheduler(
            self.recipe.optimizer, settings.schedule, settings.lr, settings.warmup, settings.max_steps, start
        )

    def _noise_seed(self) -> int:
        """Make dropout a function of the seed, the step and the rank: there is no state to keep."""
        step = self.seed * 1_000_003 + self.step + 1
        return step * self.ranks.size + self.ranks.rank

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, AMP_DTYPES.get(amp or ""), enabled=amp is not None)

    def _loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, -2).float(), targets.flatten().long(), label_smoothing=label_smoothing
        )

    def _now(self) -> float:
        """Read the clock after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _train_step(self) -> Row:
        """Take one step: `accumulate` batches forward and backward, then clip and update."""
        settings, optimizer = self.settings, self.recipe.optimizer
        learning_rate = float(optimizer.param_groups[0]["lr"])
        started = self._now()
        self.model.train()
        torch.manual_seed(self._noise_seed())
        losses = []
        for _ in range(settings.accumulate):
            batch = self.batches[self.position]
            inputs, targets = (self.ranks.share(part).to(self.device) for part in batch)
            self.position += 1
            with self._autocast():
                logits = self.forward(inputs)
            loss = self._loss(logits, targets, settings.label_smoothing) / settings.accumulate
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        before = self._now()
        grad_norm = self.recipe.step(self.scaler, loss)
        after = self._now()
        optimizer.zero_grad()
        self.scheduler.step()
        finished = self._now()
        self.step += 1
        return {
            "step": self.step,
            "run": self.run,
            "seed": self.seed,
            "train_loss": float(self.ranks.mean(loss)),
            **self._validation_metrics(),
            "bytes_per_parameter": None,
            "learning_rate": learning_rate,
            "grad_norm": float(whole(grad_norm)),
            "param_norm": float(whole(torch.nn.utils.get_total_norm(list(self.model.parameters())))),
            "seconds": (self.history[-1]["seconds"] if self.history else 0.0) + finished - started,
            "step_ms": (finished - started) * 1e3,
            "optimizer_ms": (after - before) * 1e3,
            **self._observations(),
        }

    def _observations(self) -> Row:
        """Return what the optimizer has found, as far as it was asked for."""
        found: Row = {}
        if self.ours and self.ours.guard:
            found["skipped_steps"] = int(self.ours.skipped_steps)
        if self.ours and self.ours.stats and self.step % self.settings.stats_every == 0:
            found |= self.ours.log_dict(top_k=STATS_PARAMETERS)
        return found

    def _validation_metrics(self) -> Row:
        """Return the names of what a validation measures, with None: there was none."""
        metrics = self.task.validation_metrics(None, None)
        return metrics | ({f"ema_{name}": None for name in metrics} if self.ours and self.ours.ema else {})

    def _validate(self) -> Row:
        """Evaluate on all validation examples, and keep the account that early stopping goes by.

        Where there are averages of the weights, evaluate with them too. The statistics of BatchNorm are those
        of the weights, not of their averages, in both.
        """
        loss, accuracy = self._evaluate(self.task.data.validation)
        if loss < self.best_loss:
            self.best_loss = loss
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        measured = self.task.validation_metrics(loss, accuracy)
        if self.ours and self.ours.ema:
            with self.ours.swap_ema(self.model):
                averaged = self.task.validation_metrics(*self._evaluate(self.task.data.validation))
            measured |= {f"ema_{name}": value for name, value in averaged.items()}
        return measured | {"bytes_per_parameter": self.bytes_per_parameter()}

    @torch.no_grad()
    def _evaluate(self, split: Split) -> tuple[float, float]:
        """Return the mean loss (without label smoothing) and the share of right predictions.

        Every rank evaluates all of the split, which is small. Their mean lets all stop at the same step.
        """
        self.model.eval()
        loss = correct = 0.0
        for inputs, targets in zip(split.inputs.split(128), split.targets.split(128), strict=True):
            targets = targets.to(self.device)
            with self._autocast():
                logits = self.model(inputs.to(self.device))
            loss += float(self._loss(logits, targets)) * targets.numel()
            correct += int((logits.argmax(-1) == targets).sum())
        count = split.targets.numel()
        loss, accuracy = self.ranks.mean(
            torch.tensor([loss / count, correct / count], dtype=torch.float64, device=self.device)
        ).tolist()
        return loss, accuracy
