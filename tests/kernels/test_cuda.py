"""What only the CUDA kernels have: switches, grids, hypers as kernel parameters, errors they return."""

import pytest
from format_codes import BF16, CUDA_LAYOUTS, F32, F64, NONE

from .backends import Cuda
from .model import Group, Model, Param
from .test_kernels import ids, mixed_rows, sizes

layouts = pytest.mark.parametrize("formats", CUDA_LAYOUTS, ids=ids)


@layouts
@pytest.mark.parametrize("error", [-2, 2])
def test_switches_change_no_bit(switched, formats, error):
    switched.library.set_approximation_error(error)
    params = [
        Param(n, step=3.0 * (n % 2), amsgrad=n % 3 == 0, shifts=(n % 2,) * 5)
        for n in sizes(switched.block, switched.chunk)
    ]
    Model(switched, params, formats).update(1, sums=[9.0, 16.0], max_grad_norm=2.5)
    Model(switched, params[-4:], formats).set_special_values().update(2)


def test_switched_kernels_do_use_the_approximations(switched):
    switched.library.set_approximation_error(1 << 22)
    with pytest.raises(AssertionError, match="p of row 0"):
        Model(switched, [Param(switched.chunk)]).update()


@layouts
def test_hypers_may_be_on_the_device(cuda_library, formats):
    model = mixed_rows(Cuda(cuda_library, hypers_on_host=False), formats)
    for device in range(3):
        model.update(device, sums=[4.0], max_grad_norm=0.3)


def test_as_many_hypers_as_fit_inline(cuda, cuda_library):
    groups = [Group(lr=1e-3 * (i + 1)) for i in range(61)]
    Model(cuda, [Param(5, group=i) for i in range(60)], groups=groups[:60]).update()
    model = Model(cuda, [Param(5, group=i) for i in range(61)], groups=groups)
    with pytest.raises(RuntimeError, match="too many hypers"):
        model.update()
    on_device = Cuda(cuda_library, hypers_on_host=False)
    Model(on_device, model.params, groups=groups).update()


def test_grid(cuda):
    """As many blocks as the device holds at once, no more than there are chunks, at least one."""
    c = cuda.chunk
    for n, device, grid in ((3 * c + 7, 1, 2), (2 * c, 3, 2), (0, 3, 1)):
        model = Model(cuda, [Param(n)])
        model.norm(device)
        assert cuda.device.last_grid == grid
        model.update(device)
        assert cuda.device.last_grid == grid


def test_errors_are_returned_and_the_current_device_restored(cuda):
    model = Model(cuda, [Param(5)])
    model.update(2)
    assert cuda.library.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device"):
        model.update(9)
    assert cuda.library.current_device() == 0
    for formats in ((F64, F32, F32, F32, NONE), (F32, F32, F32, F32, BF16), (F32, 7, F32, F32, NONE)):
        model.tables.formats = formats
        with pytest.raises(RuntimeError, match="not built for these formats"):
            model.update()
    with pytest.raises(RuntimeError, match="not built for this dtype"):
        model.norm()
    model.tables.formats, model.tables.chunk_size = (F32, F32, F32, F32, NONE), 1 << 31
    with pytest.raises(RuntimeError, match="chunk_size is out of range"):
        model.update()
