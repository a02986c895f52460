"""The CUDA kernels, compiled by g++ and run on the CPU by `tests/cuda_emulation`, against numpy."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from common import thin_zeros
from dtype_codes import BF16, CUDA_LAYOUTS, F16, F32, F64

from fused_adamw.tables import StepInputsStruct, chunk_table, hyper_table, row_table, set_column

ROOT = Path(__file__).parent.parent
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")

TORCH = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16, F64: torch.float64}
SIZE = {F32: 4, BF16: 2, F16: 2, F64: 8}
NAME = {F32: "fp32", BF16: "bf16", F16: "fp16", F64: "fp64"}
# More than one pass of 256 threads over a chunk, for every vector width. The norm takes more at a time.
C = 2560
C_NORM = 10240


def sizes(c: int) -> list[int]:
    return [0, 1, 3, 4, 5, 7, 8, 9, c - 1, c, c + 1, 3 * c + 7]


# ---- The tables of csrc/tables.h


def struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


I64, P = ctypes.c_int64, ctypes.c_void_p
Table = struct("Table", rows=P, n_rows=I64, grads=P, chunks=P, n_chunks=I64, chunk_size=I64)
UpdateArgs = struct(
    "UpdateArgs",
    table=Table, hypers=P, n_hypers=I64, param_dtype=I64, grad_dtype=I64, state_dtype=I64,
    inputs=StepInputsStruct, ticket=P,
)  # fmt: skip
NormArgs = struct("NormArgs", table=Table, grad_dtype=I64, partials=P, sum=P, ticket=P)
Device = struct("Device", seed=ctypes.c_uint, launches=ctypes.c_int, last_grid=ctypes.c_int)


def build(folder: Path, *flags: str) -> Path:
    """Compile the kernels into a library: an object for each parameter format, as setup.py does."""
    source = ROOT / "tests" / "cuda_emulation"
    flags = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", *flags)
    command = [CXX, *flags, "-pthread", f"-I{source}", f"-I{ROOT / 'csrc'}"]
    parts = {"library": [source / "library.cpp"]}
    for param in ("Float32", "BFloat16", "Float16", "Float64"):
        define = f"-DFUSED_ADAMW_PARAM={param}"
        parts[param] = [define, "-x", "c++", ROOT / "csrc" / "cuda" / "update.cu"]
    objects = [folder / f"{name}.o" for name in parts]
    jobs = [
        subprocess.Popen([*command, "-c", "-o", made, *what])
        for made, what in zip(objects, parts.values(), strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    subprocess.run([*command, "-shared", "-o", folder / "library.so", *objects], check=True)
    return folder / "library.so"


def load(library: Path) -> ctypes.CDLL:
    cuda = ctypes.CDLL(str(library))
    cuda.norm.restype = cuda.update.restype = ctypes.c_char_p
    cuda.emulated_device.restype = ctypes.POINTER(Device)
    cuda.device = cuda.emulated_device().contents
    return cuda


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    """The library. Emulated device d holds d + 1 blocks at once; `cuda.device` tells what was launched."""
    return load(build(tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture(scope="session")
def switched(tmp_path_factory):
    """The library with every switch of csrc/cuda/switches.h that changes how results are computed."""
    flags = ("-DFUSED_ADAMW_FAST_MATH=1", "-DFUSED_ADAMW_REVERSE_UPDATE=1")
    return load(build(tmp_path_factory.mktemp("cuda_emulation_switched"), *flags))


# ---- Memory with guards around it


def decode(stored: np.ndarray, dtype: int) -> np.ndarray:
    """Bytes as the arithmetic sees them."""
    values = torch.empty(len(stored) // SIZE[dtype], dtype=TORCH[dtype])
    if len(stored):
        values.view(torch.uint8).numpy()[:] = stored
    return values.to(torch.float64 if dtype == F64 else torch.float32).numpy()


class Buffer:
    """Values of a dtype, `shift` elements past a 16-byte border, and guards around them."""

    GUARD = 64

    def __init__(self, values, dtype: int, shift: int = 0) -> None:
        self.dtype, self.n = dtype, len(values)
        self.raw = np.full(self.n * SIZE[dtype] + 3 * self.GUARD, 0xA5, np.uint8)
        self.start = -self.raw.ctypes.data % 16 + self.GUARD + shift * SIZE[dtype]
        self.end = self.start + self.n * SIZE[dtype]
        self.raw[self.start : self.end] = self.encode(values)
        self.address = self.raw.ctypes.data + self.start

    def encode(self, values) -> np.ndarray:
        stored = torch.as_tensor(np.asarray(values)).to(TORCH[self.dtype])
        return stored.view(torch.uint8).numpy() if self.n else np.zeros(0, np.uint8)

    @property
    def bytes(self) -> np.ndarray:
        return self.raw[self.start : self.end]

    @property
    def values(self) -> np.ndarray:
        """What is stored, as the arithmetic sees it."""
        return decode(self.bytes, self.dtype)

    def check(self, values, what: str) -> None:
        """The stored bytes are those of `values`, any NaN for a NaN, and the guards are whole."""
        expected = self.encode(values)
        if not np.array_equal(self.bytes, expected):
            np.testing.assert_array_equal(self.values, decode(expected, self.dtype), what)
        assert (self.raw[: self.start] == 0xA5).all(), f"{what}: written before the first element"
        assert (self.raw[self.end :] == 0xA5).all(), f"{what}: written after the last element"


# ---- An independent AdamW


@dataclass
class Group:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    sign: float = 1.0
    lr_tensor: float | None = None


def adamw(T, p, g, m, v, v_max, group: Group, step: float, grad_scale: float):
    """One step of float32 or float64 operations, each rounded; v_max is None without amsgrad."""
    lr = group.lr if group.lr_tensor is None else float(np.float32(group.lr_tensor))
    with np.errstate(all="ignore"):
        g = g * T(group.sign * grad_scale)
        p = p * T(1.0 - lr * group.weight_decay)
        weight = 1.0 - group.beta1
        m = g - (g - m) * T(1.0 - weight) if weight >= 0.5 else m + T(weight) * (g - m)
        v = v * T(group.beta2) + T(1.0 - group.beta2) * g * g
        v_max = v if v_max is None else np.maximum(v_max, v)
        denominator = np.sqrt(v_max) / T(math.sqrt(1.0 - group.beta2**step)) + T(group.eps)
        p = p - T(lr / (1.0 - group.beta1**step)) * m / denominator
    return p, m, v, v_max


PLAIN = Group()

# ---- A model in memory


@dataclass
class Param:
    n: int
    group: int = 0
    amsgrad: bool = False
    grad: bool = True
    step: float = 0.0
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0)  # of p, g, m, v, v_max, in elements


class Model:
    """Parameters, their tables, and what a step must make of them."""

    def __init__(self, params, dtypes=(F32, F32, F32), groups=(PLAIN,), chunk_size=C, seed=0, grad_scale=1.0):
        random = np.random.default_rng(seed)
        self.params, self.dtypes, self.groups, self.chunk_size = params, dtypes, groups, chunk_size
        p_dtype, g_dtype, s_dtype = dtypes
        self.buffers = []
        for x in params:

            def values(scale):
                return (random.standard_normal(x.n) * scale).astype(np.float64)  # noqa: B023

            v = values(0.3) ** 2
            self.buffers.append((
                Buffer(values(1.0), p_dtype, x.shifts[0]),
                Buffer(values(grad_scale), g_dtype, x.shifts[1]),
                Buffer(values(0.1) * (x.step > 0), s_dtype, x.shifts[2]),
                Buffer(v * (x.step > 0), s_dtype, x.shifts[3]),
                Buffer(v * random.uniform(0.5, 2.0, x.n), s_dtype, x.shifts[4]),
                Buffer([x.step], F32),
            ))  # fmt: skip
        p, g, m, v, v_max, step = ([row[i].address for row in self.buffers] for i in range(6))
        slots = list(reversed(range(len(params))))
        self.rows = row_table(
            len(params),
            param=p,
            exp_avg=m,
            exp_avg_sq=v,
            max_exp_avg_sq=[address * x.amsgrad for address, x in zip(v_max, params, strict=True)],
            step=step,
            numel=[x.n for x in params],
            hyper=[x.group for x in params],
            slot=slots,
        )
        self.grads = torch.tensor([g[slot] * params[slot].grad for slot in slots], dtype=torch.int64)
        self.chunks = chunk_table([x.n for x in params], chunk_size)
        self.table = Table(
            self.rows.data_ptr(), len(params), self.grads.data_ptr(), self.chunks.data_ptr(),
            len(self.chunks), chunk_size,
        )  # fmt: skip
        self.lrs = [Buffer([x.lr_tensor or 0.0], F32) for x in groups]
        self.hypers = hyper_table([
            {
                "lr": x.lr, "beta1": x.beta1, "beta2": x.beta2, "eps": x.eps, "weight_decay": x.weight_decay,
                "grad_sign": x.sign, "lr_address": lr.address * (x.lr_tensor is not None),
            }
            for x, lr in zip(groups, self.lrs, strict=True)
        ])  # fmt: skip
        self.ticket = Buffer([0.0], F64)

    def norm(self, cuda, device=0):
        """The sum of squares of the gradients, and the parts that it was added from."""
        partials = Buffer([math.nan] * self.table.n_chunks, F64)
        total = Buffer([math.nan], F64)
        args = NormArgs(self.table, self.dtypes[1], partials.address, total.address, self.ticket.address)
        assert cuda.norm(ctypes.byref(args), device) is None
        for buffer in (partials, total):
            buffer.check(buffer.values, "norm")
        self.ticket.check([0.0], "ticket")
        return total.values[0], partials.values

    def update(
        self, cuda, hypers_on_host=True, device=0, sums=None, max_grad_norm=1.0, loss_scale=None,
        found_inf=None, skip_nonfinite=False,
    ):  # fmt: skip
        """Step, and compare every byte. Returns the status."""
        T = np.float64 if self.dtypes[0] == F64 else np.float32
        norm, grad_scale = 0.0, 1.0 / (loss_scale or 1.0)
        if sums is not None:
            norm = math.sqrt(sum(sums)) / (loss_scale or 1.0)
            grad_scale *= np.minimum(1.0, max_grad_norm / (norm + 1e-6))  # NaN stays NaN
        skip = bool(found_inf) or (skip_nonfinite and not math.isfinite(norm))
        expected = []
        for x, buffers in zip(self.params, self.buffers, strict=True):
            p, g, m, v, v_max, step = (b.values for b in buffers)
            if x.grad and not skip:
                group = self.groups[x.group]
                p, m, v, new_max = adamw(
                    T, p, g, m, v, v_max if x.amsgrad else None, group, float(step[0] + 1), grad_scale
                )
                v_max, step = new_max if x.amsgrad else v_max, step + 1
            expected.append((p, g, m, v, v_max, step))

        vectors = [sums or [], [loss_scale or 1.0], [found_inf or 0.0]]
        sums_, scale_, found_ = (Buffer(x, d) for x, d in zip(vectors, (F64, F32, F32), strict=True))
        status = Buffer([math.nan, 5.0], F64)
        inputs = StepInputsStruct(
            sums_.address if sums is not None else 0, len(sums or []), max_grad_norm,
            scale_.address if loss_scale is not None else 0,
            found_.address if found_inf is not None else 0,
            skip_nonfinite, status.address,
        )  # fmt: skip
        args = UpdateArgs(
            self.table,
            self.hypers.data_ptr(),
            len(self.groups),
            *self.dtypes,
            inputs,
            self.ticket.address,
        )
        before = cuda.device.launches
        assert cuda.update(ctypes.byref(args), hypers_on_host, device) is None
        assert cuda.device.launches == before + 1
        status.check([norm, 5.0 + skip], "status")
        self.ticket.check([0.0], "ticket")
        for i, (buffers, values) in enumerate(zip(self.buffers, expected, strict=True)):
            for buffer, value, name in zip(
                buffers, values, ("p", "g", "m", "v", "v_max", "step"), strict=True
            ):
                buffer.check(value, f"{name} of {self.params[i]}")
        return status.values


def ids(dtypes):
    return "-".join(NAME[x] for x in dtypes)


combinations = pytest.mark.parametrize("dtypes", CUDA_LAYOUTS, ids=ids)


# ---- Tests


@combinations
def test_update_of_every_size(cuda, dtypes):
    params = [Param(n, step=3.0 * (n % 2)) for n in sizes(C)]
    Model(params, dtypes).update(cuda, device=1, sums=[9.0, 16.0], max_grad_norm=2.5)
    assert cuda.device.last_grid == 2


@combinations
@pytest.mark.parametrize("amsgrad", [False, True])
def test_update_at_every_alignment(cuda, dtypes, amsgrad):
    together = [Param(41, shifts=(s,) * 5, amsgrad=amsgrad) for s in range(1, 8)]
    one_off = [
        Param(300, shifts=tuple(s * (i == tensor) for i in range(5)), amsgrad=amsgrad)
        for tensor in range(5)
        for s in (1, 2, 3, 4, 6)
    ]
    Model(together + one_off, dtypes, chunk_size=256).update(cuda, device=2)


def with_special_values(model: Model) -> Model:
    """Put zeros, dying and huge numbers and NaN among the others, alone and in whole vectors."""
    for tensors in model.buffers:
        for buffer in tensors[1:5]:
            values = buffer.values.copy()
            values[:64] = values[70::7] = 0.0
            values[71::31], values[64:68] = np.finfo(values.dtype).tiny / 8, 1e-30
            values[75::29] *= values.dtype.type(1e25 if buffer.dtype in (F32, BF16) else 1.0)
            values[79::37] = np.nan
            buffer.bytes[:] = buffer.encode(values)
    return model


@combinations
@pytest.mark.parametrize("error", [-2, 2])
def test_switches_change_no_bit(switched, dtypes, error):
    switched.set_approximation_error(error)
    params = [Param(n, step=3.0 * (n % 2), amsgrad=n % 3 == 0, shifts=(n % 2,) * 5) for n in sizes(C)]
    Model(params, dtypes).update(switched, device=1, sums=[9.0, 16.0], max_grad_norm=2.5)
    with_special_values(Model(params[-4:], dtypes)).update(switched, device=2)


def test_switched_kernels_do_use_the_approximations(switched):
    switched.set_approximation_error(1 << 22)
    with pytest.raises(AssertionError, match="p of Param"):
        Model([Param(C)]).update(switched)


@combinations
@pytest.mark.parametrize("hypers_on_host", [False, True], ids=["hypers on device", "hypers inline"])
def test_update_of_mixed_rows(cuda, dtypes, hypers_on_host):
    """Groups, step counts, amsgrad and missing gradients that change from row to row."""
    groups = [
        Group(),
        Group(lr=3e-3, beta1=0.4, beta2=0.99, weight_decay=0.0),  # beta1 < 0.5: torch.lerp's other branch
        Group(lr=9.0, lr_tensor=2e-3, eps=1e-5),
        Group(sign=-1.0, beta1=0.0),
    ]
    random = np.random.default_rng(1)
    params = [
        Param(
            int(random.integers(0, 900)),
            group=int(random.integers(len(groups))),
            amsgrad=bool(random.integers(2)),
            grad=bool(random.integers(4)),
            step=float(random.integers(5)),
        )
        for _ in range(40)
    ]
    model = Model(params, dtypes, groups, chunk_size=256)
    for device in range(3):
        model.update(cuda, hypers_on_host, device, sums=[4.0], max_grad_norm=0.3)


def test_as_many_hypers_as_fit_inline(cuda):
    groups = [Group(lr=1e-3 * (i + 1)) for i in range(65)]
    model = Model([Param(5, group=i) for i in range(64)], groups=groups[:64])
    model.update(cuda)
    model = Model([Param(5, group=i) for i in range(65)], groups=groups)
    with pytest.raises(AssertionError, match="too many hypers"):
        model.update(cuda)
    model.update(cuda, hypers_on_host=False)


def test_loss_scale_is_taken_out(cuda):
    model = Model([Param(77)], grad_scale=1024.0)
    status = model.update(cuda, sums=[1024.0**2 * 4.0], max_grad_norm=1.0, loss_scale=1024.0)
    assert status[0] == 2.0


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("sums", [None, [4.0], [math.nan], [math.inf]], ids=str)
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_skipped_steps(cuda, found_inf, sums, skip_nonfinite):
    params = [Param(33), Param(C + 1, amsgrad=True), Param(9, grad=False)]
    model = Model(params)
    for _ in range(2):
        model.update(cuda, device=1, sums=sums, found_inf=found_inf, skip_nonfinite=skip_nonfinite)


@combinations
def test_bad_values_stay_where_they_are(cuda, dtypes):
    """NaN and infinity in a tensor reach their own element, and amsgrad's maximum as in torch."""
    model = Model([Param(40, amsgrad=True, step=1.0), Param(40, step=1.0)], dtypes)
    for buffers in model.buffers:
        for tensor in range(5):
            values = buffers[tensor].values
            values[tensor * 7 : tensor * 7 + 3] = [math.nan, math.inf, 0.0]
            buffers[tensor].bytes[:] = buffers[tensor].encode(values)
    model.update(cuda)


@pytest.mark.parametrize("dtype", NAME, ids=NAME.get)
def test_norm_of_every_size(cuda, dtype):
    params = [Param(n, grad=n != 8, shifts=(0, n % 3, 0, 0, 0)) for n in sizes(C_NORM)]
    model = Model(params, (F32, dtype, F32), chunk_size=C_NORM)
    total, partials = model.norm(cuda, device=2)
    squares = [
        [float(x) ** 2 for x in b[1].values] if p.grad else []
        for p, b in zip(params, model.buffers, strict=True)
    ]
    expected = [math.fsum(row[i : i + C_NORM]) for row in squares for i in range(0, len(row), C_NORM)]
    expected.insert(sizes(C_NORM).index(8) - 1, 0.0)  # no gradient; and the empty row has no chunk
    np.testing.assert_allclose(partials, expected, rtol=1e-14 if dtype == F64 else 2e-7)
    np.testing.assert_allclose(total, math.fsum(partials), rtol=1e-15)


@pytest.mark.parametrize("dtype", NAME, ids=NAME.get)
def test_norm_has_the_same_bits_whatever_the_grid_the_order_and_the_alignment(cuda, dtype):
    sums = set()
    for device in range(4):
        for shift in range(3):
            params = [Param(3 * C_NORM + 7, shifts=(0, shift, 0, 0, 0)), Param(100)]
            model = Model(params, (F32, dtype, F32), chunk_size=C_NORM)
            sums.add(model.norm(cuda, device)[0])
    assert len(sums) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", NAME, ids=NAME.get)
def test_norm_of_bad_gradients(cuda, dtype, bad):
    model = Model([Param(700), Param(700)], (F32, dtype, F32), chunk_size=256)
    g = model.buffers[0][1]
    values = g.values
    values[413] = bad
    g.bytes[:] = g.encode(values)
    total, partials = model.norm(cuda)
    assert total == abs(bad) or (math.isnan(bad) and math.isnan(total))
    assert [math.isfinite(x) for x in partials] == [True, False, True, True, True, True]


def test_norm_is_finite_where_squares_overflow_float32(cuda):
    model = Model([Param(600)], (F32, F32, F32), grad_scale=1e30)
    expected = math.fsum(float(x) ** 2 for x in model.buffers[0][1].values)
    np.testing.assert_allclose(model.norm(cuda)[0], expected, rtol=1e-14)


@pytest.mark.parametrize("params", [[], [Param(0)], [Param(0), Param(0, grad=False)]], ids=len)
def test_nothing_to_do(cuda, params):
    """No chunks: the sum is zero, the status is written, an empty parameter's step still counts."""
    model = Model(params)
    assert model.norm(cuda, device=3)[0] == 0.0
    assert cuda.device.last_grid == 1
    model.update(cuda, sums=[0.0])


def test_no_more_blocks_than_chunks(cuda):
    model = Model([Param(C), Param(C)])
    model.update(cuda, device=3)
    assert cuda.device.last_grid == 2


def test_errors_are_returned_and_the_current_device_restored(cuda):
    model = Model([Param(5)])
    model.update(cuda, device=2)
    assert cuda.current_device() == 0
    with pytest.raises(AssertionError, match="invalid device"):
        model.update(cuda, device=9)
    assert cuda.current_device() == 0
    model.dtypes = (F64, F32, F32)
    with pytest.raises(AssertionError, match="not built for these dtypes"):
        model.update(cuda)
    model.dtypes = (F32, 7, F32)
    with pytest.raises(AssertionError, match="not built for this dtype"):
        model.norm(cuda)
    model.dtypes, model.table.chunk_size = (F32, F32, F32), 1 << 31
    with pytest.raises(AssertionError, match="chunk_size is out of range"):
        model.update(cuda)


def test_positions_that_32_bits_do_not_hold(cuda):
    """The chunks with such positions of a row of 2**32 + 1 elements, in thin memory."""
    numel, far = 2**32 + 1, [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
    c = 2**12
    index = sorted({place // c for place in far})
    p, g, m, v = [thin_zeros(numel, torch.float32).numpy() for _ in range(4)]
    g[far] = 1.0
    model = Model([Param(1)], chunk_size=c)
    for name, t in (("param", p), ("exp_avg", m), ("exp_avg_sq", v)):
        set_column(model.rows, name, [t.ctypes.data])
    set_column(model.rows, "numel", [numel])
    model.grads[0] = g.ctypes.data
    model.chunks = torch.tensor([[0, i] for i in index], dtype=torch.int32)
    model.table.chunks, model.table.n_chunks = model.chunks.data_ptr(), len(index)
    assert model.norm(cuda)[0] == len(far)
    status = Buffer([0.0, 0.0], F64)
    inputs = StepInputsStruct(max_grad_norm=1.0, status=status.address)
    hypers = model.hypers.data_ptr()
    args = UpdateArgs(model.table, hypers, 1, F32, F32, F32, inputs, model.ticket.address)
    assert cuda.update(ctypes.byref(args), True, 0) is None
    for t, value in ((p, -1e-2), (m, 0.1), (v, 1e-3)):
        np.testing.assert_allclose(t[far], value, rtol=1e-6)
        for i in index:
            chunk = t[i * c : (i + 1) * c]
            assert np.flatnonzero(chunk).tolist() == [x - i * c for x in far if x // c == i]
