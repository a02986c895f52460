"""Feeds kernels, operators and `load_state_dict` with what libFuzzer makes up: `python fuzz.py walk ...`.

    walk       tables as Python builds them, walked by the kernels: each byte is compared with the oracle
    overrun    the same, where a row says to have an element more than it has: must be found
    operators  any arguments of the operators: refused or taken
    loading    any state_dict: refused or taken, and then stepped with

Runs with atheris's AddressSanitizer preloaded and the package built for it, as run.py does it. Further
arguments are libFuzzer's.
"""

import contextlib
import sys
import warnings

import atheris

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from format_codes import CPU_LAYOUTS, NONE, averages  # noqa: E402

with atheris.instrument_imports(include=["fused_adamw"]):
    from fused_adamw import FusedHygieneAdamW
    from fused_adamw.extension import load_extension
    from fused_adamw.tables import (
        Averaging,
        ChunkStruct,
        RowStruct,
        SpikeOptions,
        StepInputs,
        set_column,
        status_words,
        words,
    )

from kernels.backends import Native  # noqa: E402
from kernels.model import GROUPS, Model, Param  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


# ---- Tables


def param(data) -> Param:
    """A row."""
    n = data.ConsumeIntInRange(0, 600)
    columns = data.ConsumeIntInRange(1, max(1, n)) if data.ConsumeBool() else None
    if columns is not None:
        n -= n % columns
    shift = [data.ConsumeIntInRange(0, 7) for _ in range(3)]
    return Param(
        n,
        group=data.ConsumeIntInRange(0, len(GROUPS) - 1),
        amsgrad=data.ConsumeBool(),
        grad=data.ConsumeIntInRange(0, 7) > 0,
        step=float(data.ConsumeIntInRange(0, 5)),
        shifts=(shift[0], shift[1], shift[2], shift[0], shift[1]),
        side_shifts=(shift[1] % 2,) * 5,
        columns=columns,
        whole_columns=None if columns is None else columns + data.ConsumeIntInRange(0, 300),
        offset=data.ConsumeIntInRange(0, 2**40),
        ordinal=data.ConsumeIntInRange(0, 2**31),
        average=data.ConsumeBool(),
        average_shift=shift[2],
    )


def model(data) -> Model:
    formats = CPU_LAYOUTS[data.ConsumeIntInRange(0, len(CPU_LAYOUTS) - 1)]
    known = [NONE, *averages(formats)]
    spikes = SpikeOptions(3.0, data.ConsumeIntInRange(2, 5), 2, data.ConsumeBool())
    made = Model(
        Native(),
        [param(data) for _ in range(data.ConsumeIntInRange(1, 5))],
        formats,
        GROUPS,
        chunk_size=data.ConsumeIntInRange(1, 8) * 64,
        seed=data.ConsumeIntInRange(0, 255),
        average=known[data.ConsumeIntInRange(0, len(known) - 1)],
        averaging=Averaging(0.9, 0, data.ConsumeIntInRange(0, 3), data.ConsumeIntInRange(1, 3)),
        spikes=spikes if data.ConsumeBool() else SpikeOptions(),
        stats=data.ConsumeBool(),
    )
    return made.set_special_values() if data.ConsumeBool() and min(p.n for p in made.params) > 80 else made


def step(made: Model, data) -> None:
    sums = made.norm()[1] if made.spikes.window or data.ConsumeBool() else None  # spikes take a norm
    made.update(
        sums=None if sums is None else [*sums, 0.0],
        max_grad_norm=data.ConsumeIntInRange(1, 9) / 4.0,
        loss_scale=2.0 ** data.ConsumeIntInRange(-3, 10) if data.ConsumeBool() else None,
        found_inf=float(data.ConsumeBool()) if data.ConsumeBool() else None,
        skip_nonfinite=data.ConsumeBool(),
    )


def walk(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    made = model(data)
    for _ in range(data.ConsumeIntInRange(1, 2)):
        step(made, data)


def overrun(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    made = model(data)
    if made.params[0].n > 500:  # not at once
        set_column(made.tables.rows, "numel", [p.n + 1 for p in made.params])
    step(made, data)


# ---- Arguments of the operators


def tensor(data) -> torch.Tensor:
    """Any, of few elements."""
    shape = [data.ConsumeIntInRange(0, 20) for _ in range(data.ConsumeIntInRange(0, 3))]
    device = "meta" if data.ConsumeIntInRange(0, 15) == 0 else "cpu"
    made = torch.zeros(shape, dtype=DTYPES[data.ConsumeIntInRange(0, len(DTYPES) - 1)], device=device)
    return made.t() if made.dim() == 2 and data.ConsumeBool() else made


def number(data) -> int:
    return data.ConsumeInt(8) if data.ConsumeBool() else data.ConsumeIntInRange(-3, 9)


def walked(made: Model, data) -> None:
    """Tables that are right, beside what need not be: where results are written, and the step's inputs."""
    t = made.tables

    def any_of(good):
        return tensor(data) if data.ConsumeBool() else good

    tables = (t.rows, t.grads, t.chunks, t.chunk_size)
    workspace = any_of(t.workspace)
    if data.ConsumeBool():
        sum_ = any_of(torch.zeros(1, dtype=torch.float64))
        torch.ops.fused_adamw.sum_of_squares(*tables, t.formats[1], workspace, sum_)
    else:
        inputs = StepInputs(torch.zeros(status_words(0), dtype=torch.float64))
        outputs = (workspace, any_of(t.stats))
        torch.ops.fused_adamw.update(*tables, t.hypers, t.formats, any_of(inputs.record), *outputs)


def unwalked(data) -> None:
    """Tables without a row or without a chunk, whose addresses nobody follows; they may be of anything."""
    rows, grads, chunks = (tensor(data) if data.ConsumeBool() else empty for empty in EMPTY)
    if rows.dim() == 2 and len(rows):
        rows = rows[:0]
    if chunks.dim() == 2 and len(chunks):
        chunks = chunks[:0]
    tables = (rows, grads, chunks, number(data))
    formats = [number(data) for _ in range(data.ConsumeIntInRange(0, 6))]
    if data.ConsumeBool():
        torch.ops.fused_adamw.sum_of_squares(*tables, number(data), tensor(data), tensor(data))
    else:
        inputs = torch.zeros(data.ConsumeIntInRange(0, 30), dtype=torch.int64)
        torch.ops.fused_adamw.update(*tables, tensor(data), formats, inputs, tensor(data), tensor(data))


# Of rows, gradients and chunks.
EMPTY = (
    torch.zeros(0, words(RowStruct), dtype=torch.int64),
    torch.zeros(1, dtype=torch.int64),
    torch.zeros(0, len(ChunkStruct._fields_), dtype=torch.int32),
)


def operators(raw: bytes) -> None:
    """What is wrong in sizes, dtypes, devices or layouts has to be refused."""
    data = atheris.FuzzedDataProvider(raw)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        walked(model(data), data) if data.ConsumeBool() else unwalked(data)


# ---- What is loaded


def anything(data, depth: int = 0):
    """A value that a file may hold."""
    kind = data.ConsumeIntInRange(0, 9 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return data.ConsumeBool()
    if kind == 2:
        return data.ConsumeInt(4)
    if kind == 3:
        return data.ConsumeFloat()
    if kind == 4:
        return data.ConsumeUnicodeNoSurrogates(4)
    if kind in (5, 6):
        return tensor(data)
    if kind == 7:
        return [anything(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))]
    if kind == 8:
        return tuple(anything(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3)))
    return {key(data): anything(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))}


def key(data):
    keys = [
        "step",
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "master_residual",
        "exp_avg_code",
        0,
        1,
        "guard",
    ]
    return keys[data.ConsumeIntInRange(0, len(keys) - 1)]


def change(saved: dict, data) -> None:
    """Something in it becomes anything, or is left out, or is added."""
    place = saved
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        name = keys[data.ConsumeIntInRange(0, len(keys) - 1)] if keys else key(data)
        below = place[name] if keys else None
        if isinstance(below, (dict, list)) and below and data.ConsumeIntInRange(0, 3):
            place = below
            continue
        if not isinstance(place, dict):
            if keys:
                place[name] = anything(data)
        elif data.ConsumeIntInRange(0, 3) == 0:
            place.pop(name, None)
        else:
            place[key(data) if data.ConsumeBool() else name] = anything(data)
        return


def loading(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(3, 4), (5,)]]
    optimizer = FusedHygieneAdamW(params, lr=0.1, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved = {
        "state": {i: dict(s) for i, s in saved["state"].items()},
        "param_groups": [dict(group) for group in saved["param_groups"]],
    }
    for _ in range(data.ConsumeIntInRange(1, 3)):
        change(saved, data)
    try:
        optimizer.load_state_dict(saved)
        optimizer.step()
    except REFUSALS:
        pass


# Torch's own `load_state_dict` lets these through for what is no state_dict at all.
REFUSALS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, NotImplementedError)
TARGETS = {"walk": walk, "overrun": overrun, "operators": operators, "loading": loading}


def main() -> None:
    load_extension()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
