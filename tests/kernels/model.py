"""Parameters in memory, the tables that kernels walk, and what a step must make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from format_codes import BF16, F32, F64

from fused_adamw.tables import StepInputs, Tables, chunk_table, hyper_table, row_table

from .buffers import Buffer

NAMES = ("p", "g", "m", "v", "v_max", "step")


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
    Group(weight_decay_mode="corrected", weight_decay=10.0, nesterov=True),
    Group(betas=(0.4, 0.99), cautious_weight_decay=True, nesterov=True, lr_tensor=True),
)


@dataclass
class Param:
    """A row."""

    n: int
    group: int = 0
    amsgrad: bool = False
    grad: bool = True
    step: float = 0.0
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0)  # of p, g, m, v, v_max, in elements


class Model:
    """What kernels are called with; they mutate it, and every byte of it is compared.

    Where they take a `grid`, it is one of `kernels.grids`.
    """

    def __init__(
        self, kernels, params: Sequence[Param], formats=(F32, F32, F32, F32), groups=PLAIN, chunk_size=None,
        seed=0, grad_scale=1.0,
    ):  # fmt: skip
        self.kernels, self.params, self.formats, self.groups = kernels, params, formats, groups
        random = np.random.default_rng(seed)
        self.buffers = [draw(random, param, formats, grad_scale) for param in params]
        p, g, m, v, v_max, step = ([row[i].address for row in self.buffers] for i in range(6))
        slots = list(reversed(range(len(params))))  # not those of the rows
        chunks = chunk_table([x.n for x in params], chunk_size or kernels.chunk)
        self.lrs = [Buffer([group.lr], F32) for group in groups]
        self.workspace = Buffer([0.0] + [5.0] * len(chunks), F64)
        self.tables = Tables(
            rows=row_table(
                len(params),
                param=p,
                exp_avg=m,
                exp_avg_sq=v,
                max_exp_avg_sq=[address * x.amsgrad for address, x in zip(v_max, params, strict=True)],
                step=step,
                numel=[x.n for x in params],
                hyper=[x.group for x in params],
                slot=slots,
            ),
            grads=torch.tensor([g[slot] * params[slot].grad for slot in slots], dtype=torch.int64),
            chunks=chunks,
            chunk_size=chunk_size or kernels.chunk,
            hypers=hyper_table([fields(*pair) for pair in zip(groups, self.lrs, strict=True)]),
            formats=formats,
            workspace=self.workspace.tensor,
        )

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
        self, grid=None, sums=None, max_grad_norm=1.0, loss_scale=None, found_inf=None, skip_nonfinite=False
    ):
        """Step, and compare every byte. Returns the status."""
        norm, grad_scale = 0.0, 1.0 / (loss_scale or 1.0)
        if sums is not None:
            norm = math.sqrt(sum(sums)) / (loss_scale or 1.0)
            grad_scale *= oracle.clip_coefficient(norm, max_grad_norm)
        skip = bool(found_inf) or (skip_nonfinite and not math.isfinite(norm))
        expected = [
            self.expected(*row, grad_scale) if row[0].grad and not skip else [b.values for b in row[1]]
            for row in zip(self.params, self.buffers, strict=True)
        ]

        status = Buffer([math.nan, 5.0], F64)
        given = [
            None if values is None else Buffer(values, dtype).tensor
            for values, dtype in (
                (sums, F64),
                (None if loss_scale is None else [loss_scale], F32),
                (None if found_inf is None else [found_inf], F32),
            )
        ]
        inputs = StepInputs(status.tensor, given[0], max_grad_norm, *given[1:], skip_nonfinite)
        self.kernels.update(self.tables, inputs, self.grid(grid))
        status.check([norm, 5.0 + skip], "status")
        self.check_workspace()
        rtol = self.kernels.rtol(self.formats)
        for i, (buffers, values) in enumerate(zip(self.buffers, expected, strict=True)):
            for buffer, value, name in zip(buffers, values, NAMES, strict=True):
                exact = name in ("g", "step")
                buffer.check(value, f"{name} of row {i}, {self.params[i]}", 0.0 if exact else rtol)
        return status.values

    def expected(self, param: Param, buffers, grad_scale: float):
        """What a step makes of a row."""
        p, g, m, v, v_max, step = (b.values for b in buffers)
        group = replace(self.groups[param.group], amsgrad=param.amsgrad)
        if group.lr_tensor:
            group.lr = float(self.lrs[param.group].values[0])
        wide = np.float64 if self.formats[0] == F64 else np.float32
        values = (x.astype(wide) for x in (p, g, m, v, v_max))
        p, m, v, new_max = oracle.adamw(*values, group, float(step[0] + 1), grad_scale)
        v_max = new_max if param.amsgrad else v_max
        p, m, v, v_max = (
            self.kernels.rounded(x, b.dtype)
            for x, b in zip((p, m, v, v_max), (buffers[0], *buffers[2:5]), strict=True)
        )
        return p, g, m, v, v_max, step + 1

    def grid(self, grid):
        return self.kernels.grids[0] if grid is None else grid

    def check_workspace(self) -> None:
        """The ticket is 0 again, and the guards are whole."""
        assert (self.workspace.bytes[:8] == 0).all()
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
                values[75::29] *= values.dtype.type(1e25 if buffer.dtype in (F32, BF16) else 1.0)
                values[79::37] = np.nan
                buffer.write(values)
        return self


def draw(random, param: Param, formats, grad_scale: float) -> tuple[Buffer, ...]:
    """Parameter, gradient, moments, maximum, step. Moments are 0 before the first step."""
    p_format, g_format, m_format, v_format = formats
    started = param.step > 0

    def normal(scale):
        return random.standard_normal(param.n) * scale

    v = normal(0.3) ** 2
    return (
        Buffer(normal(1.0), p_format, param.shifts[0]),
        Buffer(normal(grad_scale), g_format, param.shifts[1]),
        Buffer(normal(0.1) * started, m_format, param.shifts[2]),
        Buffer(v * started, v_format, param.shifts[3]),
        Buffer(v * random.uniform(0.5, 2.0, param.n), m_format, param.shifts[4]),
        Buffer([param.step], F32),
    )


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
