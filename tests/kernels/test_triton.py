"""What only the Triton kernels have: masks, partial sums in blocks; and that they equal the native ones."""

import math

import numpy as np
import pytest
import torch
from format_codes import F16, F32, F64

from .model import GROUPS, Model, Param
from .test_kernels import ids


def test_whole_blocks_of_aligned_tensors_are_not_masked(triton):
    n = triton.block
    Model(triton, [Param(2 * n + 1)], chunk_size=2 * n + 16).update()
    assert triton.unmasked == [n] * (2 * 7)  # four tensors are read, three written
    triton.unmasked.clear()
    Model(triton, [Param(2 * n + 1, shifts=(1,) * 5)], chunk_size=2 * n + 16).update()
    assert not triton.unmasked


@pytest.mark.parametrize("tensor", range(5))
@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_misaligned_tensor_is_enough_for_masks(triton, tensor, amsgrad):
    shifts = tuple(int(i == tensor) for i in range(5))
    Model(triton, [Param(triton.block + 5, shifts=shifts, amsgrad=amsgrad)]).update()
    assert bool(triton.unmasked) == (tensor == 4 and not amsgrad)


def test_more_partial_sums_than_a_block(triton):
    import triton.language as tl

    model = Model(triton, [Param(50)], chunk_size=5)
    t, total = model.tables, torch.zeros(1, dtype=torch.float64)
    arguments = (t.rows, t.grads, t.chunks, 10, 5, t.workspace, total, tl.float32, 4)
    triton.backend.norm_kernel[(3,)](*arguments)
    assert total.item() == pytest.approx(math.fsum(model.squares()), rel=1e-13)


@pytest.mark.parametrize("formats", [(F32,) * 4, (F16, F16, F32, F32), (F64,) * 4], ids=ids)
def test_equals_the_native_kernels(triton, cpu, formats):
    models, statuses = [], []
    for kernels in (triton, cpu):
        params = [Param(triton.block + 9, group=i, amsgrad=i == 1, step=7.0 * i) for i in range(3)]
        model = Model(kernels, params, formats, GROUPS, chunk_size=triton.chunk)
        total, _ = model.norm()
        assert total == pytest.approx(math.fsum(model.squares()), rel=1e-13)
        given = {"sums": [2.0], "max_grad_norm": 0.3, "loss_scale": 4.0, "found_inf": 0.0}
        statuses.append(model.update(**given, skip_nonfinite=True))
        models.append(model)
    assert statuses[0] == statuses[1]
    for ours, theirs in zip(models[0].buffers, models[1].buffers, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.values, other.values, triton.rtol(formats), 0)


def test_unavailable_reason(triton):
    assert triton.backend.unavailable_reason(torch.device("cpu")) is None
    assert "interpreter" in triton.backend.unavailable_reason(torch.device("cuda"))
    assert "mps" in triton.backend.unavailable_reason(torch.device("mps"))
