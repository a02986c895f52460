"""The Triton kernels in Triton's interpreter, against a numpy chain.

The interpreter rounds to bfloat16 by cutting off bits where a GPU rounds to nearest: so does the chain here.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton.language as tl
from dtype_codes import BF16, CUDA_LAYOUTS, F16, F32, F64
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from fused_adamw.backends import native
from fused_adamw.backends import triton as backend
from fused_adamw.tables import StepInputs, Tables, chunk_table, hyper_table, row_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # enum DType
GUARD = 16  # elements before and after every tensor, which no kernel may touch
BLOCK = 512  # of float32


@pytest.fixture(autouse=True)
def vector_accesses(monkeypatch) -> list[int]:
    """Sizes of the blocks accessed without a mask: a GPU moves 16 bytes at a time there, aligned."""
    accessed: list[int] = []

    def watch(name: str) -> None:
        original = getattr(InterpreterBuilder, name)

        def access(self, ptr, *args):
            if ptr.data.size > 1:
                assert ptr.data[0] % 16 == 0
                accessed.append(ptr.data.size)
            return original(self, ptr, *args)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    watch("create_load")
    watch("create_store")
    return accessed


class Hyper(NamedTuple):
    lr: float | Tensor = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_sign: float = 1.0

    def fields(self) -> dict[str, float | int]:
        if not isinstance(self.lr, Tensor):
            return self._asdict()
        return {**self._asdict(), "lr": math.nan, "lr_address": self.lr.data_ptr()}


def guarded(values: Tensor, dtype: int, shift: int) -> Tensor:
    """A copy between guards, `shift` elements off a 64-byte boundary."""
    size = values.numel() + 2 * GUARD + shift
    buffer = torch.full((size,), 7.0, dtype=DTYPES[dtype])
    view = buffer[GUARD + shift : GUARD + shift + values.numel()]
    view.copy_(values)
    return view


def check_guards(tensor: Tensor) -> None:
    buffer = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    assert (buffer[:start] == 7).all()
    assert (buffer[start + tensor.numel() :] == 7).all()


@dataclass
class Param:
    """A row of the table, its tensors, and a copy of them that the chain steps."""

    numel: int
    dtypes: tuple[int, int, int] = (F32, F32, F32)
    hyper: int = 0
    shift: int = 0
    amsgrad: bool = False
    has_grad: bool = True
    steps: int = 3
    seed: int = 0
    tensors: dict[str, Tensor] = field(init=False)
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.numel)
        param_dtype, grad_dtype, state_dtype = self.dtypes

        def draw(dtype: int, squared: bool = False) -> Tensor:
            values = torch.randn(self.numel, generator=generator)
            return guarded(values.square() if squared else values, dtype, self.shift)

        self.tensors = {
            "param": draw(param_dtype),
            "grad": draw(grad_dtype),
            "exp_avg": draw(state_dtype),
            "exp_avg_sq": draw(state_dtype, squared=True),
            "max_exp_avg_sq": draw(state_dtype, squared=True),
            "step": torch.tensor(float(self.steps)),
        }
        self.remember()

    def remember(self) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def row(self) -> dict[str, int]:
        row = {name: tensor.data_ptr() for name, tensor in self.tensors.items() if name != "grad"}
        row["max_exp_avg_sq"] *= self.amsgrad
        return {**row, "numel": self.numel, "hyper": self.hyper}

    def grad_address(self) -> int:
        g, step = self.tensors["grad"].data_ptr(), self.tensors["step"].data_ptr()
        return (g or step) if self.has_grad else 0  # an empty tensor may have no address


class Model:
    """What an operator is called with."""

    def __init__(self, params: list[Param], hypers: tuple[Hyper, ...] = (Hyper(),), chunk_size: int = 1024):
        self.params, self.hyper_rows, self.chunk_size = params, hypers, chunk_size
        rows = [p.row() for p in params]
        slots = list(reversed(range(len(params))))  # not those of the rows
        grads = [params[slot].grad_address() for slot in slots]
        chunks = chunk_table([p.numel for p in params], chunk_size)
        self.tables = Tables(
            rows=row_table(
                len(rows),
                slot=slots,
                **{key: [row[key] for row in rows] for key in (rows[0] if rows else ())},
            ),
            grads=torch.tensor(grads, dtype=torch.int64),
            chunks=chunks,
            chunk_size=chunk_size,
            hypers=hyper_table([h.fields() for h in hypers]),
            dtypes=params[0].dtypes if params else (F32, F32, F32),
            workspace=torch.full((1 + len(chunks),), 5.0, dtype=torch.float64),
        )
        self.tables.workspace[0] = 0.0
        self.status = torch.zeros(2, dtype=torch.float64)

    def norm_sum(self, kernels=backend) -> Tensor:
        total = torch.full((1,), math.nan, dtype=torch.float64)
        kernels.sum_of_squares(self.tables, self.tables.chunks, total)
        assert self.tables.workspace[0] == 0
        return total

    def update(self, sums=None, max_norm=1.0, skip=False, grad_scale=None, found_inf=None, kernels=backend):
        kernels.update(self.tables, StepInputs(self.status, sums, max_norm, grad_scale, found_inf, skip))
        assert self.tables.workspace[0] == 0

    def check(self, scale: float = 1.0, rtol: float = 0.0) -> None:
        """Compare all tensors with the chain's; bitwise unless rtol is given."""
        for i, param in enumerate(self.params):
            hyper = self.hyper_rows[param.hyper]
            expected = chain(param, hyper, scale) if param.has_grad else param.before
            for name, tensor in param.tensors.items():
                wanted, got = expected[name].double().numpy(), tensor.double().numpy()
                np.testing.assert_allclose(got, wanted, rtol, 0, err_msg=f"row {i}, {param.numel}: {name}")
                if name != "step":
                    check_guards(tensor)

    def check_untouched(self) -> None:
        for param in self.params:
            for name, tensor in param.tensors.items():
                np.testing.assert_array_equal(tensor.double(), param.before[name].double())


def stored(values: np.ndarray, dtype: int) -> Tensor:
    """To a storage type as the interpreter rounds."""
    if dtype == BF16:
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return torch.from_numpy(values).to(DTYPES[dtype])


def chain(param: Param, hyper: Hyper, grad_scale: float) -> dict[str, Tensor]:
    """AdamW in numpy, one operation after another, in float32 (float64 for float64 parameters)."""
    param_dtype, _, state_dtype = param.dtypes
    T = np.float64 if param_dtype == F64 else np.float32
    p, g, m, v, v_max = (
        param.before[name].to(torch.from_numpy(T([0])).dtype).numpy()
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    )
    step = param.steps + 1
    lr = hyper.lr.item() if isinstance(hyper.lr, Tensor) else hyper.lr
    weight = 1.0 - hyper.beta1
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        g = g * T(hyper.grad_sign * grad_scale)
        p = p * T(1.0 - lr * hyper.weight_decay)
        m = g + T(weight - 1.0) * (g - m) if weight >= 0.5 else m + T(weight) * (g - m)
        v = v * T(hyper.beta2) + T(1.0 - hyper.beta2) * g * g
        v_max = np.maximum(v_max, v) if param.amsgrad else v
        bias_correction2_sqrt = T(math.sqrt(1.0 - hyper.beta2**step))
        denominator = np.sqrt(v_max) / bias_correction2_sqrt + T(hyper.eps)
        p = p - T(lr / (1.0 - hyper.beta1**step)) * m / denominator
    return {
        "param": stored(p, param_dtype),
        "grad": param.before["grad"],
        "exp_avg": stored(m, state_dtype),
        "exp_avg_sq": stored(v, state_dtype),
        "max_exp_avg_sq": stored(v_max, state_dtype) if param.amsgrad else param.before["max_exp_avg_sq"],
        "step": torch.tensor(float(step)),
    }


def squares(params: list[Param]) -> float:
    return sum(p.before["grad"].double().square().sum().item() for p in params if p.has_grad)


def scalar(value: float, dtype=torch.float32) -> Tensor:
    return torch.tensor([value], dtype=dtype)


GROUPS = (
    Hyper(),
    Hyper(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.0),
    Hyper(lr=scalar(2e-3), beta1=0.3, grad_sign=-1.0),  # beta1 < 0.5: the other side of lerp
)


@pytest.mark.parametrize("dtypes", CUDA_LAYOUTS, ids=lambda d: "-".join(str(DTYPES[i])[6:] for i in d))
def test_every_type_and_size(dtypes):
    """Borders of blocks and chunks, aligned or not, with and without amsgrad, groups and gradients mixed."""
    chunk = 2 * BLOCK + 16  # aligned, no whole number of blocks
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 7]
    params = [
        Param(n, dtypes, hyper=i % 3, amsgrad=i % 4 == 2, shift=i % 5 == 4, steps=i % 3 * 100, seed=i)
        for i, n in enumerate(sizes)
    ]
    params.insert(3, Param(BLOCK, dtypes, has_grad=False))
    model = Model(params, GROUPS, chunk)
    total = model.norm_sum()
    assert total.item() == pytest.approx(squares(params), rel=1e-13)
    model.update(total, max_norm=0.1)
    norm = math.sqrt(total.item())
    assert model.status.tolist() == [norm, 0.0]
    model.check(0.1 / (norm + 1e-6), rtol=1e-12 if dtypes == (F64, F64, F64) else 0.0)


@pytest.mark.parametrize("chunk_size", [3, BLOCK, BLOCK + 1, 1000, 1 << 14])
def test_any_chunk_size(chunk_size):
    model = Model([Param(min(4 * chunk_size, 1300) + 1)], chunk_size=chunk_size)
    assert model.norm_sum().item() == pytest.approx(squares(model.params), rel=1e-13)
    model.update()
    model.check()


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_one_misaligned_tensor(name):
    param = Param(BLOCK + 5, amsgrad=True)
    param.tensors[name] = guarded(param.tensors[name], F32, shift=1)
    model = Model([param])
    assert model.norm_sum().item() == pytest.approx(squares(model.params), rel=1e-13)
    model.update()
    model.check()


def test_whole_blocks_of_aligned_tensors_are_not_masked(vector_accesses):
    Model([Param(2 * BLOCK + 1)]).update()
    assert vector_accesses == [BLOCK] * (2 * 7)  # four tensors are read, three written
    vector_accesses.clear()
    Model([Param(2 * BLOCK + 1, shift=1)]).update()
    assert not vector_accesses


def test_sums_of_several_tables():
    model = Model([Param(100)])
    model.update(torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64), max_norm=0.5)
    model.check(0.5 / (3.0 + 1e-6))
    assert model.status.tolist() == [3.0, 0.0]


def test_small_norm_is_not_clipped():
    model = Model([Param(100)])
    model.update(scalar(0.25, torch.float64), max_norm=1.0)
    model.check(1.0)


def test_no_norm():
    model = Model([Param(100)])
    model.update(None, max_norm=0.0, skip=True)
    model.check()
    assert model.status.tolist() == [0.0, 0.0]


def test_max_grad_norm_is_not_rounded():
    model = Model([Param(100, (F64, F64, F64))])
    model.update(scalar(4.0, torch.float64), max_norm=0.1)
    model.check(0.1 / (2.0 + 1e-6), rtol=1e-12)


def test_loss_scale():
    model = Model([Param(100)])
    model.update(scalar(9.0, torch.float64), max_norm=0.5, grad_scale=scalar(2.0), found_inf=scalar(0.0))
    model.check(0.5 * (0.5 / (1.5 + 1e-6)))
    assert model.status.tolist() == [1.5, 0.0]


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_found_inf_skips(skip_nonfinite):
    model = Model([Param(100), Param(0)])
    for skipped in (1.0, 2.0):
        model.update(scalar(4.0, torch.float64), skip=skip_nonfinite, found_inf=scalar(1.0))
        model.check_untouched()
        assert model.status.tolist() == [2.0, skipped]
    model.update(found_inf=scalar(0.0))
    model.check()
    assert model.status.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nonfinite_gradient(value):
    model = Model([Param(BLOCK + 9), Param(20)])
    model.params[0].tensors["grad"][BLOCK + 3] = value
    model.params[0].remember()
    total = model.norm_sum()
    norm = math.sqrt(total.item())
    assert not math.isfinite(norm)

    model.update(total, skip=True)
    model.check_untouched()
    np.testing.assert_array_equal(model.status, [norm, 1.0])

    model.update(
        total, skip=False
    )  # as torch.nn.utils.clip_grad_norm_: an infinite norm makes 0, NaN makes NaN
    model.check(math.nan if math.isnan(norm) else 0.0)
    np.testing.assert_array_equal(model.status, [norm, 1.0])


def test_amsgrad_keeps_nan():
    param = Param(8, amsgrad=True)
    param.tensors["max_exp_avg_sq"][2] = math.nan
    param.tensors["exp_avg_sq"][3] = math.nan
    param.remember()
    model = Model([param])
    model.update()
    model.check()
    assert param.tensors["max_exp_avg_sq"][2:4].isnan().all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9999), (0.999, 0.9)])
@pytest.mark.parametrize("steps", [0, 1, 10**6])
def test_bias_correction(betas, steps):
    """To 1e-12 in float64, where exp(n * log(beta)) stands for beta ** n."""
    model = Model([Param(4, (F64, F64, F64), steps=steps)], (Hyper(beta1=betas[0], beta2=betas[1]),))
    with np.errstate(divide="ignore"):  # log(0)
        model.update()
    model.check(rtol=1e-12)


def test_learning_rate_is_read_at_each_step():
    lr = scalar(1e-3)
    model = Model([Param(10)], (Hyper(lr=lr),))
    model.update()
    model.check()
    lr.fill_(0.5)
    model.params[0].steps += 1
    model.params[0].remember()
    model.update()
    model.check()


def test_rows_without_chunks_are_counted():
    """More rows than fit one block; empty tensors are stepped too, and rows without a gradient are not."""
    params = [Param(0, has_grad=i % 3 != 1, steps=i) for i in range(700)]
    model = Model(params)
    total = model.norm_sum()
    model.update(total)
    model.check()
    assert total.item() == 0.0
    assert model.status.tolist() == [0.0, 0.0]


def test_no_rows():
    model = Model([], hypers=())
    assert model.norm_sum().item() == 0.0
    model.update(scalar(4.0, torch.float64))
    assert model.status.tolist() == [2.0, 0.0]


def test_large_gradients_do_not_overflow():
    param = Param(10)
    param.tensors["grad"].fill_(1e30)
    param.remember()
    assert Model([param]).norm_sum().item() == pytest.approx(10 * float(np.float32(1e30)) ** 2)


def test_norm_is_the_same_for_any_grid(monkeypatch):
    model = Model([Param(3000, seed=seed) for seed in range(3)], chunk_size=512)
    first = model.norm_sum()
    for programs in (1, 3, 4, 18):
        monkeypatch.setattr(backend, "_INTERPRETED_PROGRAMS", programs)
        model.tables.workspace[1:] = math.nan
        assert torch.equal(model.norm_sum(), first)
    model.check_untouched()


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_any_number_of_programs(programs, monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED_PROGRAMS", programs)
    model = Model([Param(40), Param(0), Param(70, hyper=1)], GROUPS, chunk_size=16)
    assert model.norm_sum().item() == pytest.approx(squares(model.params), rel=1e-13)
    model.update()
    model.check()


def test_more_partial_sums_than_a_block():
    model = Model([Param(50)], chunk_size=5)
    total = torch.zeros(1, dtype=torch.float64)
    t = model.tables
    arguments = (t.rows, t.grads, t.chunks, 10, 5, t.workspace, total, tl.float32, 4)
    backend.norm_kernel[(3,)](*arguments)
    assert total.item() == pytest.approx(squares(model.params), rel=1e-13)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F16, F16, F32), (F64, F64, F64)])
def test_equals_the_native_kernels(dtypes):
    assert native.why_not(torch.device("cpu")) is None
    runs = []
    for kernels in (backend, native):
        model = Model(
            [Param(BLOCK + 9, dtypes, i, amsgrad=i == 1, steps=i * 7, seed=i) for i in range(3)], GROUPS
        )
        total = model.norm_sum(kernels)
        assert total.item() == pytest.approx(squares(model.params), rel=1e-13)
        model.update(scalar(2.0, torch.float64), 0.3, True, scalar(4.0), scalar(0.0), kernels=kernels)
        runs.append(model)
    for ours, theirs in zip(runs[0].params, runs[1].params, strict=True):
        for name, tensor in ours.tensors.items():
            rtol = 1e-12 if dtypes[0] == F64 else 0.0
            np.testing.assert_allclose(tensor, theirs.tensors[name], rtol, err_msg=name)
    assert torch.equal(runs[0].status, runs[1].status)


def test_why_not():
    assert backend.why_not(torch.device("cpu")) is None
    assert "interpreter" in backend.why_not(torch.device("cuda"))
    assert "mps" in backend.why_not(torch.device("mps"))
