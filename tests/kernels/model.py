"""Parameters in memory, the tables that kernels walk, and what a step must make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from format_codes import BF16, F32, F64, NONE, SPLIT, STOCHASTIC, TAKES_NOISE, has_codes, takes_noise
from formats.oracle import noise_pair

from fused_adamw.tables import (
    NO_AVERAGING,
    NO_SPIKES,
    RowStruct,
    StepInputs,
    Tables,
    chunk_table,
    hyper_table,
    row_table,
    word_of,
)

from . import besides
from .buffers import Buffer
from .outcomes import Outcomes

NAMES = ("p", "g", "m", "v", "v_max", "step", "average")
FIELDS = {"param": 0, "exp_avg": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 4, "average": 6}  # whose they are


@dataclass
class Group(oracle.Hypers):
    """Hyper-parameters of rows; whether amsgrad is on is the row's."""

    lr: float = 1e-2
    weight_decay: float = 0.1
    lr_tensor: bool = False  # the learning rate is float32, where the kernels run


PLAIN = (Group(),)
# beta1 < 0.5 takes torch.lerp's other branch.
GROUPS = (
    Group(),
    Group(lr=3e-3, betas=(0.4, 0.99), weight_decay=0.0),
    Group(lr=2e-3, eps=1e-5, lr_tensor=True),
    Group(betas=(0.0, 0.999), maximize=True),
    Group(weight_decay_mode="constant", weight_decay=1e-3, cautious_weight_decay=True),
    Group(weight_decay_mode="corrected", weight_decay=10.0, lr_ref=1.0, nesterov=True),
    Group(betas=(0.4, 0.99), cautious_weight_decay=True, nesterov=True, lr_tensor=True),
)


@dataclass
class Param:
    """A row: a tensor, or a shard of one.

    Attributes:
        n: Elements.
        group: Its index.
        amsgrad: Whether there is a maximum; never where moments are codes.
        grad: Whether there is a gradient.
        step: Updates made so far.
        shifts: Of p, g, m, v, v_max, in elements.
        side_shifts: The same, of what is kept beside them.
        columns: The length of its rows; None: it is one row.
        whole_columns: The same in the whole tensor.
        offset: Where its first element lies there.
        ordinal: Its number among all parameters; None: one that is no other number of its row.
        average: Whether it has one, where the model has a format for it.
        average_shift: Of the average, in elements.
    """

    n: int
    group: int = 0
    amsgrad: bool = False
    grad: bool = True
    step: float = 0.0
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0)
    side_shifts: tuple[int, ...] = (0, 0, 0, 0, 0)
    columns: int | None = None
    whole_columns: int | None = None
    offset: int = 0
    ordinal: int | None = None
    average: bool = True
    average_shift: int = 0

    def index(self) -> np.ndarray:
        """The place of each element in the whole tensor."""
        i, local = np.arange(self.n, dtype=np.uint64), np.uint64(self.columns or 1)
        whole = np.uint64(self.whole_columns or self.columns or 1)
        return np.uint64(self.offset) + i // local * whole + i % local


class Model:
    """What kernels are called with; they mutate it, and every byte of it is compared.

    Where they take a `grid`, it is one of `kernels.grids`.

    Attributes:
        averaging: How averages follow their parameters, if there are any.
    """

    noise_seed = 0xFEDCBA9876543210

    def __init__(
        self, kernels, params: Sequence[Param], formats=(F32, F32, F32, F32), groups=PLAIN, chunk_size=None,
        seed=0, grad_scale=1.0, average=NONE, averaging=NO_AVERAGING, spikes=NO_SPIKES, stats=False,
    ):  # fmt: skip
        self.kernels, self.formats, self.groups = kernels, formats, groups
        self.average, self.averaging, self.spikes = average, averaging, spikes
        self.params = [complete(param, i, formats, average) for i, param in enumerate(params)]
        random = np.random.default_rng(seed)
        self.buffers = [draw(random, param, formats, grad_scale, average) for param in self.params]
        self.lrs = [Buffer([group.lr], F32) for group in groups]
        chunks = chunk_table([x.n for x in params], chunk_size or kernels.chunk)
        self.workspace = Buffer([0.0] + [5.0] * len(chunks), F64)
        self.outcomes = Outcomes(spikes)
        self.status = Buffer(self.outcomes.words(), F64)
        self.stats = Buffer([5.0] * besides.STATS * len(chunks) * stats, F64)
        slots = list(reversed(range(len(params))))  # not those of the rows
        grads = [self.buffers[slot][1].address * params[slot].grad for slot in slots]
        self.tables = Tables(
            rows=self.rows(slots),
            grads=torch.tensor(grads, dtype=torch.int64),
            chunks=chunks,
            chunk_size=chunk_size or kernels.chunk,
            hypers=hyper_table([fields(*pair) for pair in zip(groups, self.lrs, strict=True)]),
            formats=(*formats, average),
            workspace=self.workspace.tensor,
            stats=self.stats.tensor.view(-1, besides.STATS),
        )

    def rows(self, slots: Sequence[int]) -> torch.Tensor:
        """The table of rows."""

        def there(name: str) -> list[bool]:
            absent = {"max_exp_avg_sq": "amsgrad", "average": "average"}
            return [name not in absent or getattr(param, absent[name]) for param in self.params]

        def addresses(name: str, of: str) -> list[int]:
            tensors = [getattr(buffers[FIELDS[name]], of) for buffers in self.buffers]
            return [address * is_there for address, is_there in zip(tensors, there(name), strict=True)]

        table = row_table(
            len(self.params),
            **{name: addresses(name, "address") for name in FIELDS},
            step=[buffers[5].address for buffers in self.buffers],
            numel=[x.n for x in self.params],
            hyper=[x.group for x in self.params],
            slot=slots,
            ordinal=[x.ordinal for x in self.params],
            offset=[x.offset for x in self.params],
            local_columns=[x.columns or 1 for x in self.params],
            columns=[x.whole_columns or x.columns or 1 for x in self.params],
        )
        for name in FIELDS:
            side = torch.tensor(addresses(name, "side_address"), dtype=torch.int64)
            table[:, word_of(RowStruct, name) + 1] = side
        return table

    def squares(self) -> list[float]:
        """The sum of squares of each chunk."""
        size = self.tables.chunk_size
        rows = zip(self.params, self.buffers, strict=True)
        squares = [(buffers[1].values.astype(np.float64) ** 2) * param.grad for param, buffers in rows]
        return [math.fsum(row[i : i + size]) for row in squares for i in range(0, len(row), size)]

    def norm(self, grid=None) -> tuple[float, np.ndarray]:
        """The sum of squares of the gradients, and the parts that it was added from."""
        total = Buffer([math.nan], F64)
        self.kernels.sum_of_squares(self.tables, total.tensor, self.grid(grid))
        total.check(total.values, "norm")
        self.check_workspace()
        return total.values[0], self.workspace.values[1:]

    def update(
        self,
        grid=None,
        sums=None,
        max_grad_norm=1.0,
        loss_scale=None,
        found_inf=None,
        skip_nonfinite=False,
        loss=None,
    ):
        """Step, and compare every byte. Returns what the status says, as `Found`."""
        norm = None if sums is None else math.sqrt(sum(sums)) / (loss_scale or 1.0)
        skip, grad_scale = self.outcomes.step(
            norm, max_grad_norm, loss_scale or 1.0, found_inf, skip_nonfinite, loss
        )
        expected = [
            self.expected(*row, grad_scale) if row[0].grad and not skip else [b.snapshot() for b in row[1]]
            for row in zip(self.params, self.buffers, strict=True)
        ]
        stats = self.stats.values
        if len(stats) and not skip:
            stats = self.expected_stats(grad_scale).ravel()

        def given(values, dtype: int) -> torch.Tensor | None:
            return None if values is None else Buffer(values, dtype).tensor

        inputs = StepInputs(
            status=self.status.tensor,
            sums=given(sums, F64),
            max_grad_norm=max_grad_norm,
            grad_scale=given(None if loss_scale is None else [loss_scale], F32),
            found_inf=given(None if found_inf is None else [found_inf], F32),
            skip_nonfinite=skip_nonfinite,
            seed=self.noise_seed,
            loss=given(None if loss is None else [loss], F64),
            spikes=self.spikes,
            averaging=self.averaging,
        )
        self.kernels.update(self.tables, inputs, self.grid(grid))
        self.check_status()
        self.check_workspace()
        rtol = self.kernels.rtol(self.formats)
        for i, (buffers, values) in enumerate(zip(self.buffers, expected, strict=True)):
            for buffer, value, name in zip(buffers, values, NAMES, strict=True):
                exact = name in ("g", "step")
                buffer.check_stored(value, f"{name} of row {i}, {self.params[i]}", 0.0 if exact else rtol)
        if len(stats) and sums is not None:  # the norm pass has the squares of gradients
            stats[:: besides.STATS] = self.stats.values[:: besides.STATS]
        self.stats.check(stats, "stats", rtol=1e-12 + 1e3 * rtol)  # of differences
        return self.outcomes.found

    def check_status(self) -> None:
        """The status is as expected, exactly, and what follows it but for the order of sums."""
        expected, first = np.array(self.outcomes.words()), 3 + len(self.outcomes.counts)
        np.testing.assert_array_equal(self.status.values[:first], expected[:first], err_msg="status")
        self.status.check(expected, "history", rtol=1e-12)

    def expected(self, param: Param, buffers, grad_scale: float):
        """What a step makes of a row: the bits of each buffer."""
        p, g, m, v, v_max, step, average = buffers
        count = step.values[0] + 1
        low, high = self.noise(param, int(count))

        def stored(x: np.ndarray, buffer: Buffer, noise: np.ndarray | None):
            rounded = self.kernels.rounded(x, buffer.format)
            return buffer.stored(rounded, noise if buffer.format in TAKES_NOISE else None)

        new = self.numbers(param, buffers, grad_scale)
        p_stored, m, v, new_max = (
            stored(*what) for what in zip(new, (p, m, v, v_max), (low, low, high, None), strict=True)
        )
        v_max = new_max if param.amsgrad else v_max.snapshot()
        weight = besides.average_weight(self.averaging, int(count)) if param.average else 0.0
        new_average = average.snapshot()
        if weight:
            kept = p.loaded(*p_stored).astype(self.wide)
            new_average = stored(besides.lerp(average.values, kept, weight), average, low)
        return p_stored, g.snapshot(), m, v, v_max, step.stored([count]), new_average

    @property
    def wide(self) -> type[np.floating]:
        """Of the arithmetic."""
        return np.float64 if self.formats[0] == F64 else np.float32

    def numbers(self, param: Param, buffers, grad_scale: float):
        """What a step makes of the numbers of a row, before they are stored: p, m, v, v_max."""
        p, g, m, v, v_max, step, _ = buffers
        group = replace(self.groups[param.group], amsgrad=param.amsgrad)
        if group.lr_tensor:
            group.lr = float(self.lrs[param.group].values[0])
        numbers = (b.values.astype(self.wide) for b in (p, g, m, v, v_max))
        return oracle.adamw(*numbers, group, float(step.values[0] + 1), grad_scale)

    def expected_stats(self, grad_scale: float) -> np.ndarray:
        """What an update must leave of each chunk; of those of rows without a gradient, what is there."""
        size, stats, first = self.tables.chunk_size, self.stats.values.reshape(-1, besides.STATS), 0
        for param, buffers in zip(self.params, self.buffers, strict=True):
            n_chunks = -(-param.n // size)
            if param.grad:
                p, g = (b.values.astype(self.wide) for b in buffers[:2])
                chunk_of = self.chunks_of(param)
                after = self.numbers(param, buffers, grad_scale)[0]
                for chunk in range(n_chunks):
                    here = chunk_of == chunk
                    stats[first + chunk] = besides.chunk_stats(
                        p[here], after[here], g[here], is_bfloat16(buffers[0])
                    )
            first += n_chunks
        return stats

    def chunks_of(self, param: Param) -> np.ndarray:
        """The chunk that each element of a row is stepped with: of codes, that of its block's first one."""
        i = np.arange(param.n)
        if has_codes(self.formats):
            i -= i % param.columns % 128
        return i // self.tables.chunk_size

    def noise(self, param: Param, step: int):
        """That of parameter and exp_avg, and that of exp_avg_sq, where any is drawn."""
        if not takes_noise((*self.formats, self.average)):
            return None, None
        return noise_pair(self.noise_seed, param.ordinal, step, param.index())

    def grid(self, grid):
        return self.kernels.grids[0] if grid is None else grid

    def check_workspace(self) -> None:
        """The ticket is 0 again, and the guards are whole."""
        assert (self.workspace.values[:1].view(np.uint64) == 0).all()
        self.workspace.check(self.workspace.values, "workspace")

    def set_special_values(self) -> Model:
        """Put zeros, dying and huge numbers and NaN among the others, alone and in whole vectors."""
        subnormal = BF16 not in self.formats or self.kernels.subnormal_bfloat16
        for tensors in self.buffers:
            for buffer in tensors[1:5]:
                values = buffer.values.copy()
                tiny = np.finfo(values.dtype).tiny * (0.125 if subnormal else 8.0)
                values[:64] = values[70::7] = 0.0
                values[71::31], values[64:68] = tiny, 1e-30
                values[75::29] *= values.dtype.type(1e25 if buffer.format in (F32, BF16) else 1.0)
                # One takes its whole block of codes along.
                values[79 :: 500 if has_codes(self.formats) else 37] = np.nan
                buffer.write(values)
        return self


def is_bfloat16(buffer: Buffer) -> bool:
    """Whether a parameter is kept in 16 bits that are those of a bfloat16."""
    return buffer.format in (BF16, STOCHASTIC, SPLIT)


def complete(param: Param, i: int, formats, average: int) -> Param:
    """Row i, with what follows from the formats and from the rest."""
    coded = has_codes(formats)
    columns = max(1, param.n) if param.columns is None and coded else param.columns
    ordinal = 1000 + 7 * i if param.ordinal is None else param.ordinal
    amsgrad, has_average = param.amsgrad and not coded, param.average and average != NONE
    return replace(param, columns=columns, ordinal=ordinal, amsgrad=amsgrad, average=has_average)


def draw(random, param: Param, formats, grad_scale: float, average: int) -> tuple[Buffer, ...]:
    """Parameter, gradient, moments, maximum, step, average. Moments are 0 before the first step."""
    max_format = F32 if has_codes(formats) else formats[2]
    started = param.step > 0

    def normal(scale):
        return random.standard_normal(param.n) * scale

    v = normal(0.3) ** 2
    numbers = [normal(1.0), normal(grad_scale), normal(0.1) * started, v * started]
    numbers.append(v * random.uniform(0.5, 2.0, param.n))
    kept = zip(numbers, (*formats, max_format), param.shifts, param.side_shifts, strict=True)
    averaged = Buffer(normal(1.0), F32 if average == NONE else average, param.average_shift)
    return (*(Buffer(*what, columns=param.columns) for what in kept), Buffer([param.step], F32), averaged)


def fields(group: Group, lr: Buffer) -> dict[str, float | int]:
    """A row of the table of hypers."""
    return {
        "lr": math.nan if group.lr_tensor else group.lr,
        "beta1": group.betas[0],
        "beta2": group.betas[1],
        "eps": group.eps,
        "weight_decay": group.weight_decay,
        "decay_power": {"constant": 0, "lr": 1, "corrected": 2}[group.weight_decay_mode],
        "cautious": group.cautious_weight_decay,
        "nesterov": group.nesterov,
        "grad_sign": -1 if group.maximize else 1,
        "lr_address": lr.address * group.lr_tensor,
    }
