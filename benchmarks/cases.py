"""What is timed, as data: the tensors of each case, and the races on them with their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from fused_adamw import EMA, SpikeGuard
from fused_adamw.layout import same_layout

from .training import Training, gpt, linear_layers, resnet

Shape = tuple[int, ...]
Layout = Literal["contiguous", "channels-last", "expanded"]


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


# Give a contiguous tensor a layout.
LAYOUTS: dict[Layout, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels-last": _channels_last,
    "expanded": lambda t: t.flatten()[:1].clone().expand(t.shape),
}


@dataclass(frozen=True)
class Precision:
    """How ours keeps bfloat16 parameters and their moments.

    Attributes:
        options: Of FusedHygieneAdamW, as pairs.
        kept: Bytes per value of parameters and state.
        moved: Bytes per value that a step moves, with and without the clip: what is kept is read and written,
            a bfloat16 gradient is read twice or once.
        error: The most by which three updates may differ from those of float32, relative to these: the
            formats' own rounding.
    """

    options: tuple[tuple[str, Any], ...]
    kept: float
    error: float

    @property
    def moved(self) -> tuple[float, float]:
        return 2 * self.kept + 4, 2 * self.kept + 2


@dataclass(frozen=True)
class Besides:
    """What ours does besides stepping.

    Attributes:
        options: Of FusedHygieneAdamW, as pairs.
        passes: How often it passes over memory the size of the parameters.
    """

    options: tuple[tuple[str, Any], ...]
    passes: int = 0

    @property
    def ema(self) -> EMA | None:
        """The averages that are kept."""
        return dict(self.options).get("ema")


@dataclass(frozen=True)
class Case:
    """The parameters of one model.

    Attributes:
        name: What tables call it.
        shapes: One shape per tensor.
        dtype: Of parameters, gradients and moments.
        grad_dtype: Of gradients, where it is another.
        layout: How parameters and moments are laid out.
        grad_layout: How gradients are.
        group_of: The group of each tensor; empty: one group.
        training: Builds a model with these parameters from its depth and width; None: there are only tensors.
        size: Depth and width of the model.
        precision: How ours keeps them; None: as `dtype` says, as torch does.
        besides: What ours does besides; None: nothing.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32
    group_of: tuple[int, ...] = ()
    training: Callable[[int, int], Training] | None = None
    size: tuple[int, int] = (0, 0)
    precision: Precision | None = None
    besides: Besides | None = None
    grad_dtype: torch.dtype | None = None
    layout: Layout = "contiguous"
    grad_layout: Layout = "contiguous"

    @property
    def has_other_grads(self) -> bool:
        """Whether gradients are kept otherwise than parameters: torch's fused step gets copies of them."""
        return self.grad_dtype is not None or self.grad_layout != self.layout

    @property
    def bytes_copied(self) -> int:
        """Bytes that are moved to bring gradients into the layout of their parameters."""
        copied = 0
        for shape in self.shapes:
            like = torch.empty(shape, device="meta")
            own, other = (LAYOUTS[layout](like) for layout in (self.layout, self.grad_layout))
            if not same_layout(shape, own.stride(), other.stride()):
                copied += prod(shape) * (1 if self.grad_layout == "expanded" else 2)
        return copied * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of values."""
        return sum(map(prod, self.shapes))

    @property
    def groups(self) -> list[list[int]]:
        """The tensors of each group."""
        group_of = self.group_of or (0,) * len(self.shapes)
        return [[i for i, g in enumerate(group_of) if g == group] for group in sorted(set(group_of))]

    def bytes_moved(self, passes: int) -> int:
        """Bytes that a step moves if it passes `passes` times over memory the size of the parameters."""
        return passes * self.dtype.itemsize * self.numel

    def tiny(self) -> Case:
        """Some of the tensors with few values each, to try the machinery; of a model, two narrow layers."""
        if self.training is not None:
            return training_case(self.name, self.training, (2, 16))
        if self.precision is not None:  # fewer values would not be kept in 8 bits
            return replace(self, shapes=((16, 512),))
        some = slice(None, None, max(1, len(self.shapes) // 32))
        shapes = tuple(tuple(min(size, 24) for size in shape) for shape in self.shapes[some])
        return replace(self, shapes=shapes, group_of=self.group_of[some])


def training_case(name: str, training: Callable[[int, int], Training], size: tuple[int, int]) -> Case:
    """A case with a model."""
    with torch.device("meta"):  # only its shapes are wanted here
        shapes = tuple(tuple(p.shape) for p in training(*size).model.parameters())
    return Case(name, shapes, training=training, size=size)


def _gpt2_shapes(layers: int, width: int) -> Iterator[Shape]:
    yield from [(50257, width), (1024, width)]
    for _ in range(layers):
        yield from [(width,), (width,)]  # ln_1
        yield from [(width, 3 * width), (3 * width,), (width, width), (width,)]  # attention
        yield from [(width,), (width,)]  # ln_2
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]  # MLP
    yield from [(width,), (width,)]  # ln_f


def _resnet50_shapes() -> Iterator[Shape]:
    def conv_bn(outputs: int, inputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    yield from conv_bn(64, 3, 7)
    inputs = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            yield from conv_bn(width, inputs, 1)
            yield from conv_bn(width, width, 3)
            yield from conv_bn(4 * width, width, 1)
            if block == 0:
                yield from conv_bn(4 * width, inputs, 1)
            inputs = 4 * width
    yield from [(1000, 2048), (1000,)]


def _vit_b_layers(width: int = 768) -> Iterator[list[Shape]]:
    """ViT-B/16 by layer: each half of a block is one; the final norm and the head belong to the last."""
    yield [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    norm: list[Shape] = [(width,), (width,)]
    for block in range(12):
        yield [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
        mlp: list[Shape] = [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        yield mlp if block < 11 else [*mlp, *norm, (1000, width), (1000,)]


def _vit_b_50_groups() -> Case:
    """Layer-wise learning rates: 25 layers, each with a group that decays and one that does not."""
    shapes, group_of = [], []
    for layer, members in enumerate(_vit_b_layers()):
        for shape in members:
            decays = len(shape) in (2, 4)
            shapes.append(shape)
            group_of.append(2 * layer + (not decays))
    return Case("vit-b-50-groups", tuple(shapes), group_of=tuple(group_of))


GPT2 = Case("gpt2-124m", tuple(_gpt2_shapes(12, 768)))
RESNET50 = Case("resnet50", tuple(_resnet50_shapes()))
VIT_B = _vit_b_50_groups()
SMALL = Case("500x1k", ((1000,),) * 500)
SMALL_IN_GROUPS = replace(SMALL, name="500x1k-64-groups", group_of=tuple(i * 64 // 500 for i in range(500)))
MEDIUM = Case("500x20k", ((20_000,),) * 500)
SCALARS = Case("500x1", ((1,),) * 500)
ONE_TENSOR = Case("100m-fp32", ((100_000_000,),))
ONE_BF16 = Case("50m-bf16", ((50_000_000,),), torch.bfloat16)
# Parameters that live on the CPU, of a model that computes in bfloat16 on a GPU.
OFFLOADED = Case("50m-fp32-bf16-grads", ((50_000_000,),), grad_dtype=torch.bfloat16)
# 128 divides the rows: a scale of four bytes for so many codes.
_SPLIT, _STOCHASTIC = ("master_weights", "split"), ("stochastic_rounding", True)
_CODES = 2 * (1 + 4 / 128)
PRECISIONS = {
    "split-fp32": Precision((_SPLIT, ("state_dtype", torch.float32)), 12, 1e-5),
    "split-bf16": Precision((_SPLIT, ("state_dtype", torch.bfloat16)), 8, 3e-3),
    "split-8bit": Precision((_SPLIT, ("state_dtype", "8bit")), 4 + _CODES, 3e-2),
    "stochastic-bf16": Precision((_STOCHASTIC, ("state_dtype", torch.bfloat16)), 6, 8e-2),
    "stochastic-8bit": Precision((_STOCHASTIC, ("state_dtype", "8bit")), 2 + _CODES, 8e-2),
}


def low_precision_cases(name: str, shapes: tuple[Shape, ...]) -> list[Case]:
    """bfloat16 tensors in each of the precisions."""
    return [
        Case(f"{name}-{key}", shapes, torch.bfloat16, precision=precision)
        for key, precision in PRECISIONS.items()
    ]


# Gradients in another layout than parameters, as hooks may leave them. Autograd gives both the same.
RESNET50_CHANNELS_LAST = replace(RESNET50, name="resnet50-channels-last", layout="channels-last")
RESNET50_CHANNELS_LAST_GRADS = replace(
    RESNET50, name="resnet50-channels-last-grads", grad_layout="channels-last"
)
EXPANDED_GRADS = replace(SMALL, name="500x1k-expanded-grads", grad_layout="expanded")
OTHER_GRADS = (RESNET50_CHANNELS_LAST, RESNET50_CHANNELS_LAST_GRADS, EXPANDED_GRADS)
SMALL_COMPLEX = replace(SMALL, name="500x1k-complex", dtype=torch.complex64)
ONE_COMPLEX = Case("10m-complex", ((10_000_000,),), torch.complex64)
LOW_PRECISION = low_precision_cases("50m", ((12_207, 4_096),))
BESIDES = {
    "stats": Besides((("stats", True),)),
    "guard": Besides((("guard", SpikeGuard()),)),
    "ema": Besides((("ema", EMA(0.999)),), passes=2),
}


def besides_cases(case: Case) -> list[Case]:
    """The same tensors, where ours does something besides."""
    return [replace(case, name=f"{case.name}-{key}", besides=besides) for key, besides in BESIDES.items()]


WITH_BESIDES = besides_cases(Case("50m-fp32", ((50_000_000,),)))
GPT2_WITH_BESIDES = besides_cases(GPT2)
GPT2_XL = Case("gpt2-1.5b", tuple(_gpt2_shapes(48, 1600)))
GPT2_XL_BF16 = replace(GPT2_XL, name="gpt2-1.5b-bf16", dtype=torch.bfloat16)
GPT2_XL_LOW_PRECISION = low_precision_cases("gpt2-1.5b", GPT2_XL.shapes)
MANY = Case("2000x1k", ((1000,),) * 2000)


TRAIN_MANY = training_case("train-500-small", linear_layers, (250, 32))
TRAIN_RESNET = training_case("train-resnet-like", resnet, (53, 64))
TRAIN_GPT = training_case("train-gpt-like", gpt, (6, 256))

CASES = {
    case.name: case
    for case in (
        *(GPT2, RESNET50, VIT_B, MEDIUM, SMALL, SMALL_IN_GROUPS, SCALARS, ONE_TENSOR, ONE_BF16, OFFLOADED),
        *(
            GPT2_XL,
            GPT2_XL_BF16,
            MANY,
            TRAIN_MANY,
            TRAIN_RESNET,
            TRAIN_GPT,
            *OTHER_GRADS,
            SMALL_COMPLEX,
            ONE_COMPLEX,
            *LOW_PRECISION,
            *GPT2_XL_LOW_PRECISION,
            *WITH_BESIDES,
            *GPT2_WITH_BESIDES,
        ),
    )
}


Gradients = Literal["kept", "moved", "new"]


@dataclass(frozen=True)
class Race:
    """One case, stepped by ours and by peers in turn.

    Attributes:
        case: The parameters.
        threads: CPU threads; None on a GPU.
        clip: Clip + step, or the step alone.
        gradients: At the same addresses in every step ("kept"), at other ones ("moved", as may be after
            `zero_grad(set_to_none=True)`), or made by forward and backward before every step ("new").
        peers: The peers, where they are not those of all races.
        target_ratios: The ratio to reach over each peer.
        target_copy_fraction: The share of copy bandwidth to reach.
        target_stream_fraction: The share of the bandwidth of four reads and three writes to reach.
        target_ms: The time to stay below.
    """

    case: Case
    threads: int | None = None
    clip: bool = True
    gradients: Gradients = "kept"
    peers: tuple[str, ...] = ()
    target_ratios: Mapping[str, float] = field(default_factory=dict)
    target_copy_fraction: float | None = None
    target_stream_fraction: float | None = None
    target_ms: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [self.case.name, "clip+step" if self.clip else "step"]
        parts += [f"{self.threads}t"] * (self.threads is not None)
        return "/".join(parts + ["moved-grads"] * (self.gradients == "moved"))

    def tiny(self) -> Race:
        """The same race on few values, without targets."""
        targets = dict.fromkeys(("target_copy_fraction", "target_stream_fraction", "target_ms"))
        return replace(self, case=self.case.tiny(), target_ratios={}, **targets)


# The step alone is never to be slower than torch's fused step, nor two threads than one.
_STEP = {"clip": False, "target_ratios": {"fused": 1.0}}
_TWO = {"one-thread": 1.0}
_OFFLOAD = {"clip": False, "peers": ("fused", "deepspeed")}
# Against torch's fused step that reads gradients as if they were laid out as parameters, which is wrong.
_WRONG = {"fused-wrong": 0.8, "fused": 1.0}
# Of 20 bytes moved against 16, a step may take as much more time.
_LOW_PRECISION_TARGETS = {"50m-split-fp32": {"float32+copy": 1.5}, "50m-split-bf16": {"plain": 16 / 20}}
# 10 passes over memory, against 13 and 11.
_EMA = {"fused+average": 1.25, "fused+timm": 1.25, "plain+average": 1.05}

# Races of one case are neighbours: its tensors are made once.
CPU_RACES = (
    Race(TRAIN_MANY, 1, gradients="new", target_ratios={"fused": 6.0}),
    Race(TRAIN_MANY, 2, gradients="new", target_ratios=_TWO),
    Race(TRAIN_RESNET, 1, gradients="new", target_ratios={"fused": 2.5}),
    Race(TRAIN_RESNET, 2, gradients="new", target_ratios=_TWO),
    Race(TRAIN_GPT, 1, gradients="new"),
    Race(TRAIN_GPT, 2, gradients="new", target_ratios=_TWO),
    Race(GPT2, 2, target_ratios={"fused": 1.5, **_TWO}),
    Race(GPT2, 2, **_STEP),
    Race(RESNET50, 2, target_ratios=_TWO),
    Race(RESNET50, 2, **_STEP),
    *(
        Race(
            case,
            threads,
            peers=(*targets, "one-thread"),
            target_ratios=targets | (_TWO if threads == 2 else {}),
        )
        for case, targets in (
            (RESNET50_CHANNELS_LAST, _WRONG),
            (RESNET50_CHANNELS_LAST_GRADS, _WRONG),
            (EXPANDED_GRADS, {"fused": 1.0}),
            (SMALL_COMPLEX, {"foreach": 1.0}),
            (ONE_COMPLEX, {"foreach": 1.0}),
        )
        for threads in (1, 2)
    ),
    Race(VIT_B, 2, target_ratios=_TWO),
    Race(MEDIUM, 1, target_ratios={"fused": 1.4}),
    Race(MEDIUM, 2, target_ratios={"fused": 2.0, **_TWO}),
    Race(MEDIUM, 2, **_STEP),
    Race(SMALL, 1, target_ratios={"fused": 5.0}),
    Race(SMALL, 2, target_ratios={"fused": 7.0, **_TWO}),
    Race(SMALL, 1, gradients="moved", target_ratios={"fused": 5.0}),
    Race(SMALL, 2, gradients="moved", target_ratios={"fused": 7.0, **_TWO}),
    Race(SMALL, 2, **_STEP),
    Race(SMALL_IN_GROUPS, 2, target_ratios={"fused": 5.0, **_TWO}),
    Race(SCALARS, 2, target_ratios={"fused": 11.0, **_TWO}, target_ms=0.040 + 0.0004 * len(SCALARS.shapes)),
    Race(SCALARS, 2, gradients="moved", target_ratios={"fused": 11.0, **_TWO}),
    Race(SCALARS, 2, **_STEP),
    Race(ONE_TENSOR, 1, target_ratios={"fused": 1.4}, target_stream_fraction=0.95),
    Race(ONE_TENSOR, 1, **_OFFLOAD, target_ratios={"fused": 1.0, "deepspeed": 1.0}),
    Race(ONE_TENSOR, 2, target_ratios={"fused": 1.6, **_TWO}),
    Race(ONE_TENSOR, 2, **_OFFLOAD, target_ratios={"fused": 1.0, "deepspeed": 1.0}),
    Race(OFFLOADED, 1, **_OFFLOAD, target_ratios={"fused": 1.0, "deepspeed": 1.82}),
    Race(OFFLOADED, 2, **_OFFLOAD, target_ratios={"fused": 1.0, "deepspeed": 1.82}),
    Race(ONE_BF16, 1, target_ratios={"fused": 2.0}, target_stream_fraction=0.65),
    Race(ONE_BF16, 2, target_ratios={"fused": 2.0, **_TWO}, target_stream_fraction=0.92),
    Race(ONE_BF16, 2, **_STEP),
    *(
        Race(case, 2, target_ratios=_TWO | _LOW_PRECISION_TARGETS.get(case.name, {}))
        for case in LOW_PRECISION
    ),
    *(
        Race(case, threads, target_ratios=targets | (_TWO if threads == 2 else {}))
        for case, targets in zip(WITH_BESIDES, ({"plain": 0.97}, {"plain": 0.97}, _EMA), strict=True)
        for threads in (1, 2)
    ),
)
