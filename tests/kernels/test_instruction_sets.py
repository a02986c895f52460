"""The CPU kernels have the bits of the oracle on every instruction set, whichever is chosen here."""

import pytest
from compiler import CXX
from format_codes import BF16, F16, F32, F64, LOW_PRECISION
from instruction_sets import ISAS, has_isa

from .backends import InstructionSet, build_instruction_set
from .model import GROUPS, Model, Param
from .test_formats import set_bits
from .test_kernels import ids, sizes

layouts = pytest.mark.parametrize(
    "formats", [(F32,) * 4, (BF16,) * 4, (F16,) * 4, (F64,) * 4, *LOW_PRECISION], ids=ids
)


@pytest.fixture(scope="module", params=ISAS)
def isa(request):
    """The kernels of each."""
    if CXX is None or not has_isa(request.param):
        pytest.skip(f"needs g++, and a processor with {request.param}")
    return InstructionSet(build_instruction_set(request.param))


@layouts
def test_update_of_every_size(isa, formats):
    lengths = [*sizes(isa.block, 256), *range(31, 39), *range(63, 67)]
    params = [
        Param(n, step=2.0 * (n % 2), amsgrad=i % 3 == 0, group=i % len(GROUPS)) for i, n in enumerate(lengths)
    ]
    model = Model(isa, params, formats, GROUPS, chunk_size=256)
    for _ in range(2):
        model.update(sums=[4.0], max_grad_norm=0.3)


@layouts
def test_every_kind_of_bits(isa, formats):
    params = [Param(300, step=5.0), Param(300, columns=100, whole_columns=257, offset=2**16 - 40)]
    model = Model(isa, params, formats)
    if F64 not in formats:
        set_bits(model)
    model.update()
