"""The plan: its tables, and that it is rebuilt when, and only when, it is no longer true."""

import ctypes
import itertools
import logging
import shutil
import subprocess
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from common import NATIVE, assert_same_path, give_grads, parameters, twins, with_gaps
from torch.optim.lr_scheduler import LambdaLR

from fused_adamw import stepping, tables
from fused_adamw.extension import load_extension
from fused_adamw.formats import FORMATS
from fused_adamw.step import guard, plan, snapshot

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture
def built(monkeypatch):
    """A list that grows by one with every plan that is built."""
    plans = []

    class Counted(plan.Plan):
        def __init__(self, *args, **kwargs):
            plans.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(stepping, "Plan", Counted)
    return plans


class Pair:
    """Our optimizer beside torch's, to see that a step after a change is right."""

    def __init__(self, target, shapes=((5, 5), (70,), (5, 5)), **options):
        self.params = parameters(shapes, device=target.device)
        self.copies = twins(self.params)
        self.ours = target.adamw(self.params, lr=1e-2, max_grad_norm=1e9, **options)
        self.theirs = torch.optim.AdamW(self.copies, lr=1e-2, foreach=False, **options)
        self.steps = 0

    def both(self):
        """Each optimizer with its parameters: changes are made to both."""
        return (self.ours, self.params), (self.theirs, self.copies)

    def step(self, steps=1, without=()):
        for _ in range(steps):
            for optimizer, params in self.both():
                give_grads(params, self.steps)
                for i in without:
                    params[i].grad = None
                optimizer.step()
            self.steps += 1
        assert_same_path(self.params, self.copies, self.steps, grad_error=1e-6)


# Tables


def test_chunk_table():
    table = tables.chunk_table([0, 1, 4, 5, 0, 9], 4)
    assert table.dtype == torch.int32
    assert table.tolist() == [[1, 0], [2, 0], [3, 0], [3, 1], [5, 0], [5, 1], [5, 2]]
    assert tables.chunk_table([], 4).shape == tables.chunk_table([0, 0], 4).shape == (0, 2)


def test_chunk_table_of_more_elements_than_32_bits_count():
    numel = 2**32 + 1
    table = tables.chunk_table([numel, 3], 1 << 15)
    assert table[-1].tolist() == [1, 0]
    assert table[-2].tolist() == [0, 2**17]
    assert len(table) == 2**17 + 2


STRUCTS = {
    "Field": tables.FieldStruct,
    "Row": tables.RowStruct,
    "Chunk": tables.ChunkStruct,
    "Hyper": tables.HyperStruct,
    "Averaging": tables.AveragingStruct,
    "SpikeOptions": tables.SpikeOptionsStruct,
    "Status": tables.StatusStruct,
    "SpikeHistory": tables.SpikeHistoryStruct,
    "Series": tables.SeriesStruct,
    "ChunkStats": tables.ChunkStatsStruct,
    "StepInputs": tables.StepInputsStruct,
}
OUTCOMES = {
    "kStepped": "stepped",
    "kClippedSpike": "clipped_spike",
    "kOverflow": "overflow",
    "kNonfinite": "nonfinite",
    "kSpike": "spike",
    "kLossSpike": "loss_spike",
}
WARMUPS = {"kNoWarmup": None, "kTimmWarmup": "timm", "kDiffusersWarmup": "diffusers"}
CODES = {
    "kFloat32": "float32",
    "kBFloat16": "bfloat16",
    "kFloat16": "float16",
    "kFloat64": "float64",
    "kStochasticBFloat16": "bfloat16_stochastic",
    "kSplitBFloat16": "bfloat16_split",
    "kSignedRoot": "root_signed",
    "kUnsignedRoot": "root_unsigned",
}


def test_layouts_are_those_of_the_c_structs(tmp_path):
    """Compiles tables.h and asks it where every field is, and which type it has."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "the tests need the C++ compiler that the extension was built with"
    c_types = {
        ctypes.c_uint64: "uint64_t",
        ctypes.c_int64: "int64_t",
        ctypes.c_uint32: "uint32_t",
        ctypes.c_int32: "int32_t",
        ctypes.c_double: "double",
        tables.FieldStruct: "Field",
        tables.AveragingStruct: "Averaging",
        tables.SpikeOptionsStruct: "SpikeOptions",
    }
    lines = []
    for name, struct in STRUCTS.items():
        bound = ", ".join(f"f{i}" for i in range(len(struct._fields_)))
        lines.append(f"{{ [[maybe_unused]] auto [{bound}] = {name}(); }}")  # as many fields
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        for field, c_type in struct._fields_:
            lines.append(f'std::printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
            is_pointer = f"std::is_pointer_v<decltype({name}::{field})>"
            item = getattr(c_type, "_type_", c_type)  # of an array
            c_name = c_types[c_type if isinstance(item, str) else item]
            is_same = f"std::is_same_v<std::remove_extent_t<decltype({name}::{field})>, {c_name}>"
            lines.append(f"static_assert({is_pointer} || {is_same});")
    lines += [
        f'std::printf("{d} %d\\n", static_cast<int>({d}));'
        for d in [*CODES, *OUTCOMES, *WARMUPS, "kNoFormat"]
    ]
    source = tmp_path / "layout.cpp"
    source.write_text(
        '#include <cstddef>\n#include <cstdio>\n#include <type_traits>\n#include "tables.h"\n'
        "using namespace fused_adamw;\nint main() {\n" + "\n".join(lines) + "\n}\n"
    )
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", source, "-o", tmp_path / "layout"], check=True)
    output = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in (line.split() for line in output.splitlines())}
    expected = {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    for name, struct in STRUCTS.items():
        expected |= {f"{name}.{field}": getattr(struct, field).offset for field, _ in struct._fields_}
    expected |= {code: tables.FORMAT_CODE[name] for code, name in CODES.items()}
    expected |= {number: tables.OUTCOMES.index(name) for number, name in OUTCOMES.items()}
    expected |= {number: tables.WARMUPS.index(name) for number, name in WARMUPS.items()}
    assert found == expected | {"kNoFormat": tables.NO_FORMAT}
    assert len(OUTCOMES) == len(tables.OUTCOMES)
    assert tables.FORMAT_CODE.keys() == FORMATS.keys()
    assert found["Row"] == 128
    assert ctypes.sizeof(tables.ChunkStruct) == 4 * tables.chunk_table([1], 1).shape[1]


def test_row_table():
    """Fields by name, others 0, and halves of a word beside each other."""
    rows = tables.row_table(2, param=[1, 2], hyper=[3, 4], slot=[5, -1], columns=[2**32 - 1, 7])
    structs = (tables.RowStruct * 2).from_buffer_copy(rows.numpy().tobytes())
    assert [row.param.values for row in structs] == [1, 2]
    assert [(row.hyper, row.slot) for row in structs] == [(3, 5), (4, -1)]
    assert [(row.local_columns, row.columns) for row in structs] == [(1, 2**32 - 1), (1, 7)]
    assert not any(row.param.side or row.exp_avg.values or row.average.values or row.step for row in structs)
    tables.set_column(rows, "exp_avg_sq", torch.tensor([8, 2**63 - 1]))
    structs = (tables.RowStruct * 2).from_buffer_copy(rows.numpy().tobytes())
    assert [row.exp_avg_sq.values for row in structs] == [8, 2**63 - 1]
    assert [row.slot for row in structs] == [5, -1]


def test_hyper_table():
    rows = tables.hyper_table([{"lr": 0.5, "grad_sign": -1}, {"lr_address": 2**63, "eps": 3.0}])
    structs = (tables.HyperStruct * 2).from_buffer_copy(rows.numpy().tobytes())
    assert [(x.lr, x.eps, x.grad_sign, x.lr_address) for x in structs] == [(0.5, 0, -1, 0), (0, 3, 0, 2**63)]
    assert tables.hyper_table([]).shape == (0, tables.words(tables.HyperStruct))


def test_one_bucket_for_all_groups(built):
    """One launch per device and dtypes, whatever the number of tensors and groups."""
    params = parameters([(3,)] * 40) + parameters([(3,)] * 4, dtype=torch.bfloat16)
    optimizer = NATIVE.adamw([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)])
    give_grads(params, 0)
    optimizer.step()
    (only,) = built
    assert [len(bucket.slots) for bucket, _, _ in only.launches] == [40, 4]
    assert not only.fallbacks


def test_fallbacks_are_logged_once_with_their_reason(caplog):
    params = parameters([(3, 4), (3, 4), (5,)])
    params[1].data = with_gaps(params[1])
    optimizer = NATIVE.adamw(list(zip("abc", params, strict=True)))
    for step in range(3):
        give_grads(params, step)
        with caplog.at_level(logging.DEBUG, "fused_adamw"):
            optimizer.step()
    lines = [r.getMessage() for r in caplog.records if "reference" in r.getMessage()]
    assert lines == [
        "parameter 'b' is stepped by the reference: parameter is not dense: strides (8, 2) for shape (3, 4)"
    ]


def test_copies_of_gradients_are_logged_once(caplog):
    params = parameters([(3, 4), (3, 4), (5,)])
    optimizer = NATIVE.adamw(list(zip("abc", params, strict=True)))
    for step in range(3):
        give_grads(params, step)
        params[1].grad = torch.ones(4, 3).t()
        with caplog.at_level(logging.DEBUG, "fused_adamw"):
            optimizer.step()
    lines = [r.getMessage() for r in caplog.records if "copied" in r.getMessage()]
    assert lines == ["the gradient of parameter 'b' is copied: it is laid out otherwise"]


# Staleness


def test_one_plan_for_a_steady_training(target, built):
    pair = Pair(target)
    scheduler = LambdaLR(pair.ours, lambda step: 0.9**step)
    peer = LambdaLR(pair.theirs, lambda step: 0.9**step)
    for _ in range(4):
        pair.step()  # with new gradient tensors every time
        scheduler.step()
        peer.step()
    for optimizer, _ in pair.both():
        optimizer.param_groups[0].update(betas=(0.5, 0.6), weight_decay=0.3, eps=1e-3, maximize=True)
    pair.ours.max_grad_norm = 1e6
    pair.step()
    assert len(built) == 1


def test_one_plan_while_gradients_come_and_go(target, built):
    pair = Pair(target)
    pair.step()
    for present in itertools.product([True, False], repeat=3):
        pair.step(without=[i for i in range(3) if not present[i]])
    assert len(built) == 1


@pytest.mark.parametrize("other", ["stepped as a tensor", "complex", "with another gradient layout"])
def test_a_steady_step_is_checked_by_one_call(target, monkeypatch, other):
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    params = [*parameters([(3, 4), (5,), ()], device=target.device)]
    dtype = torch.complex64 if other == "complex" else torch.float32
    params += parameters([(4, 4)], device=target.device, dtype=dtype)
    copies = twins(params)
    if other == "stepped as a tensor":
        params[3].data = with_gaps(params[3])
    ours = target.adamw(params, lr=1e-2, max_grad_norm=1e9)
    theirs = torch.optim.AdamW(copies, lr=1e-2, foreach=False)
    for step in range(5):
        if step == 1:
            monkeypatch.delattr(snapshot.Snapshot, "matches")
        give_grads(params, step)
        give_grads(copies, step)
        for each in (params, copies):
            each[step % 4].grad = None if step else each[0].grad
        if other == "with another gradient layout" and step != 3:
            params[3].grad = params[3].grad.t().contiguous().t()
        ours.step()
        theirs.step()
    assert_same_path(params, copies, 5, grad_error=1e-6)


def test_gradients_are_held_through_a_step(target, monkeypatch):
    """Another thread may drop them while kernels read at their addresses without the GIL."""
    params = parameters([(30,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    give_grads(params, 0)
    optimizer.step()
    bucket = optimizer._plan.launches[0].bucket
    update, is_alive = bucket.update, []

    def drop_and_update(*args):
        grad = weakref.ref(params[0].grad)
        params[0].grad = None
        is_alive.append(grad() is not None)
        update(*args)

    monkeypatch.setattr(bucket, "update", drop_and_update)
    give_grads(params, 1)
    optimizer.step()
    assert is_alive == [True]


def test_only_what_is_stepped_gets_a_new_version(target):
    """A backward pass through what a step has changed is to be refused, and only that."""
    pair = Pair(target)
    pair.step()
    for without in ((0,), (1, 2), (), (0, 1)):
        before = [p._version for p in pair.params]
        pair.step(without=without)
        moved = [p._version > version for p, version in zip(pair.params, before, strict=True)]
        assert moved == [i not in without for i in range(3)]


def test_a_first_gradient_needs_a_plan(target, built):
    pair = Pair(target)
    pair.step(without=[0, 1])
    pair.step(without=[0])
    pair.step()
    pair.step(2)
    assert len(built) == 3


def test_plans_settle_when_gradients_of_an_odd_layout_come_and_go(target, built):
    params = parameters([(4, 5), (4, 5)], device=target.device)
    optimizer = target.adamw(params)
    for step in range(12):
        for i, p in enumerate(params):
            p.grad = torch.ones(5, 4, device=target.device).t() if (step + i) % 2 else None
        optimizer.step()
    assert len(built) <= 4


def test_data_swapped(target, built):
    """As by FSDP, accelerate, or an exponential moving average that is swapped in."""
    pair = Pair(target)
    pair.step()
    for _, params in pair.both():
        params[0].data = torch.full((5, 5), 0.5, device=target.device)
    pair.step(2)
    assert len(built) == 1


@pytest.mark.parametrize("without_extension", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_plan_where_tensors_are_moved_before_each_step(
    target, built, amsgrad, without_extension, monkeypatch
):
    """As by offloading of states, and by what swaps weights: the plan follows."""
    if without_extension:
        monkeypatch.setattr(guard, "load_extension", lambda: "not built")
        monkeypatch.setattr(snapshot, "load_extension", lambda: "not built")
    pair = Pair(target, [(5, 5), (70,), (0,), ()], amsgrad=amsgrad)
    pair.step()
    kept = []  # or new tensors could lie where old ones were
    for i in range(6):
        for optimizer, params in pair.both():
            for p in params[i % 2 :]:
                state = optimizer.state[p]
                kept += state.values()
                for key in list(state)[: 1 + i]:
                    state[key] = state[key].clone()
                if i % 3:
                    kept.append(p.data)
                    p.data = p.data.clone()
        pair.step()
    pair.step(2)
    assert len(built) == 1


def test_tensors_that_come_to_share_memory_take_another_plan(target, built):
    """Kernels would step them at the same time; torch steps one after the other."""
    pair = Pair(target, [(6,), (6,), (6,)])
    pair.step()
    for _, params in pair.both():
        shared = torch.linspace(-1, 1, 8, device=target.device)
        params[0].data, params[2].data = shared[:6], shared[2:]
    pair.step(2)
    assert len(built) == 2
    for _, params in pair.both():
        params[2].data = torch.ones(6, device=target.device)
    pair.step(2)
    assert len(built) == 3
    assert not built[-1].fallbacks


def test_a_move_that_fails_is_made_up_for(target, monkeypatch):
    """The guard is told last."""
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        state = optimizer.state[params[0]]
        state["exp_avg"] = state["exp_avg"].clone()
    give_grads(pair.params, 1)
    if target.backend != "reference":
        bucket = pair.ours._plan.launches[0].bucket
        monkeypatch.setattr(bucket, "place", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            pair.ours.step()
        monkeypatch.undo()
    pair.step(2)


def test_views_of_one_buffer_are_stepped_by_kernels():
    """Where they do not overlap."""
    buffer = torch.randn(60)
    params = [torch.nn.Parameter(view) for view in (buffer[:20], buffer[20:50].view(5, 6), buffer[50:])]
    optimizer = NATIVE.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    assert not optimizer._plan.fallbacks


def test_data_transposed_in_place(target):
    pair = Pair(target)
    pair.step()
    for _, params in pair.both():
        params[0].data = params[0].data.t()
    pair.step(2)


def test_data_cut_in_place(target):
    """The moments no longer fit: refused, and not one element beyond the gradient is read."""
    pair = Pair(target)
    pair.step()
    p = pair.params[0]
    p.data = p.data[:2]
    p.grad = torch.ones(2, 5, device=target.device)
    with pytest.raises(RuntimeError, match=r"expected \(2, 5\)"):
        pair.ours.step()


def test_parameter_replaced_in_the_group(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        (new,) = parameters([(6,)], seed=9, device=target.device)
        params[1] = optimizer.param_groups[0]["params"][1] = new
    pair.step(2)


def test_parameters_reordered_in_the_group(target):
    pair = Pair(target)
    pair.step()
    for optimizer, _ in pair.both():
        optimizer.param_groups[0]["params"].reverse()
    pair.step(2)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_state_replaced(target, built, key):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        state = optimizer.state[params[0]]
        state[key] = torch.full_like(state[key], 2.0)
    pair.step(2)
    assert len(built) == 1


def test_moment_transposed_in_place(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t()
    pair.step(2)


def test_moment_of_another_dtype_at_the_same_address(target):
    """As the allocator hands out when one is deleted and another made. Memory after it stays as it is."""
    pair = Pair(target)
    pair.step()
    state = pair.ours.state[pair.params[1]]
    buffer = state["exp_avg"].view(torch.bfloat16)
    state["exp_avg"] = buffer[:70]
    buffer.fill_(1.0)
    pair.params[1].grad = torch.zeros(70, device=target.device)
    pair.ours.step()
    assert state["exp_avg"].lt(1.0).all()
    assert buffer[70:].eq(1.0).all()


def test_whole_state_replaced(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        optimizer.state[params[0]] = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
        optimizer.state[params[2]].clear()
    pair.step(2)
    assert pair.ours.state[pair.params[2]]["step"].item() == 2


def test_state_emptied(target):
    pair = Pair(target)
    pair.step(2)
    for optimizer, _ in pair.both():
        optimizer.state.clear()
    pair.step(2)


def test_amsgrad_turned_on_later(target):
    params = parameters([(5,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    give_grads(params, 1)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_parameters_moved_between_groups(target):
    pair = Pair(target)
    pair.step()
    for optimizer, _ in pair.both():
        first = optimizer.param_groups[0]
        optimizer.param_groups.append({**first, "params": [first["params"].pop()], "lr": 0.5})
    pair.step(2)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype(target, built):
    (p,) = parameters([(70,)], dtype=torch.bfloat16, device=target.device)
    optimizer = target.adamw([p], lr=1e-2)
    give_grads([p], 0)
    optimizer.step()
    p.grad = None
    p.grad_dtype = torch.float32
    for step in (1, 2):
        give_grads([p], step, dtype=torch.float32)
        optimizer.step()
    assert len(built) == 2
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize(
    "when",
    [
        "at first",
        "later",
    ],
)
def test_default_device_does_not_reach_the_tables(target, when):
    """As with torch.set_default_device("cuda") and a model on the CPU, or the other way round."""
    pair = Pair(target)
    if when == "later":
        pair.step()
    give_grads(pair.params, 5)
    give_grads(pair.copies, 5)
    with torch.device("meta"):
        pair.ours.step()
    pair.theirs.step()
    pair.steps += 1
    assert_same_path(pair.params, pair.copies, pair.steps, grad_error=1e-6)
    assert not pair.ours.grad_norm.is_meta
