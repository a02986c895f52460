"""The tables: their columns and rows, and that C++ reads the same layouts."""

import ctypes
import subprocess
from pathlib import Path

import torch
from compiler import CXX, ENVIRONMENT

from fused_adamw import tables
from fused_adamw.formats import FORMATS

CSRC = Path(__file__).parents[1] / "csrc"


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
    assert CXX, "the tests need the C++ compiler that the extension was built with"
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
    command = [CXX, "-std=c++17", f"-I{CSRC}", source, "-o", tmp_path / "layout"]
    subprocess.run(command, check=True, env=ENVIRONMENT)
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
