"""Which format a parameter and its moments get, by what was asked for."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_adamw.formats import BLOCK, FORMATS, has_dense_rows
from fused_adamw.groups import Role
from fused_adamw.state.precision import Precision

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CODES = ("root_signed", "root_unsigned")
UNCODED = ("bfloat16", "bfloat16_stochastic")  # what becomes of the others
EIGHT = Precision(state_dtype="8bit")

dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16, F64, torch.complex64], ids=str)


def param(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def moments(precision, p, role="matrix", names=()):
    kept = precision.formats_of(p, role, names)
    return kept.exp_avg.name, kept.exp_avg_sq.name


# ---- Dtypes


@dtypes
def test_by_default_all_is_kept_as_torch_does(dtype):
    kept = Precision().formats_of(param(64, 64, dtype=dtype), "matrix")
    assert [format.dtype for format in kept] == [dtype] * 3
    assert not any(format.stochastic or format.side_dtype for format in kept)
    assert kept.exp_avg.zeros(torch.zeros(2, 3)).values.dtype == dtype


@pytest.mark.parametrize(("asked", "wide"), [(F32, F32), (BF16, BF16), ("8bit", F64)], ids=str)
def test_moments_by_dtype(asked, wide):
    precision = Precision(state_dtype=asked)
    for dtype in (F32, BF16, F16):
        kept = precision.formats_of(param(64, 64, dtype=dtype), "bias")
        assert kept.exp_avg.dtype == kept.exp_avg_sq.dtype == (BF16 if asked == "8bit" else asked)
        assert kept.exp_avg_sq.stochastic == (asked != F32)
        assert not kept.exp_avg.stochastic
    assert precision.formats_of(param(64, 64, dtype=F64), "matrix").exp_avg.dtype == wide
    complex_ = precision.formats_of(param(64, 64, dtype=torch.complex64), "matrix")
    assert [format.dtype for format in complex_] == [torch.complex64] * 3


@pytest.mark.parametrize("asked", [None, F32, BF16, "8bit"], ids=str)
@pytest.mark.parametrize("rounding", [None, True, False])
def test_what_is_rounded_stochastically(asked, rounding):
    precision = Precision(stochastic_rounding=rounding, state_dtype=asked)
    assert precision.rounds_params == (rounding is True)
    assert precision.rounds_moments == (rounding if rounding is not None else asked in (BF16, "8bit"))
    kept = precision.formats_of(param(9, dtype=BF16), "bias")
    assert kept.param.stochastic == precision.rounds_params
    assert kept.exp_avg_sq.stochastic == (precision.rounds_moments and asked != F32)
    others = precision.formats_of(param(9, dtype=F16), "bias").param
    assert others == FORMATS["float16"]


def test_a_single_role_in_bfloat16_is_asked_for_explicitly():
    precision = Precision(state_roles={"matrix": BF16})
    assert moments(precision, param(4, 4), "matrix") == UNCODED
    assert moments(precision, param(4, 4), "norm") == ("float32", "float32")
    assert not Precision(state_roles={"matrix": F32}).rounds_moments


# ---- Masters


def test_a_master_is_for_bfloat16_parameters():
    precision = Precision(master_weights="split", stochastic_rounding=True)
    expected = {BF16: "bfloat16_split", F32: "float32", F64: "float64", torch.complex64: "complex64"}
    for dtype, name in expected.items():
        assert precision.refusal(param(3, dtype=dtype)) is None
        assert precision.formats_of(param(3, dtype=dtype), "bias").param.name == name
    kept = precision.formats_of(param(3, dtype=BF16), "bias")
    assert (kept.exp_avg.name, kept.exp_avg_sq.name) == UNCODED  # only the parameter has a master


class Marked(torch.Tensor):
    """As quantized tensors are: it has a dispatch of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [F16, torch.float8_e4m3fn, torch.complex32], ids=str)
def test_others_are_refused_a_master_by_name(dtype):
    check_refusal(param(3, dtype=dtype), f"is {dtype}: ")


def test_a_master_is_for_plain_memory():
    check_refusal(torch.Tensor._make_subclass(Marked, torch.zeros(3, dtype=BF16)), "is a Marked: ")


def check_refusal(p, reason):
    precision = Precision(master_weights="split")
    assert precision.refusal(p).startswith(reason)
    with pytest.raises(ValueError, match=reason):
        precision.formats_of(p, "bias")
    assert Precision(state_dtype=BF16).refusal(p) is None


# ---- Who is coded: dtype, role, shape, memory


@dtypes
def test_codes_by_dtype(dtype):
    coded = moments(EIGHT, param(64, 64, dtype=dtype)) == CODES
    assert coded == (dtype in (F32, BF16, F16))


@pytest.mark.parametrize("role", [*Role, None], ids=str)
def test_codes_by_role(role):
    maps = {"matrix", "convolution", "input", "output", "recurrence", "adapter_matrix"}
    known = None if role is None else role.value
    expected = CODES if known is None or known in maps else UNCODED
    assert moments(EIGHT, param(64, 64), known) == expected
    assert (EIGHT.why_uncoded(param(64, 64), known) is None) == (expected == CODES)
    if known is not None:
        assert moments(Precision(state_roles={known: "8bit"}), param(64, 64), known) == CODES
        assert moments(Precision(state_dtype="8bit", state_roles={known: F32}), param(64, 64), known) == (
            "float32",
            "float32",
        )


@pytest.mark.parametrize(
    ("shape", "coded"),
    [
        ((64, 64), True),
        ((128, 32), True),
        ((256, 31), False),  # short rows
        ((63, 64), False),  # few values
        ((4096,), False),
        ((), False),
        ((0, 64), False),
        ((64, 0), False),
        ((1, 4096), True),
        ((4096, 1), False),
        ((32, 16, 3, 3), True),
        ((16, 16, 3, 3), False),
        ((512, 1, 3, 3), False),
        ((8, 100, 7), True),
    ],
)
def test_codes_by_shape(shape, coded):
    for role in ("matrix", None):
        assert moments(EIGHT, param(*shape), role) == (CODES if coded else UNCODED)
        asked = Precision(state_roles={"matrix": "8bit"})
        assert asked.why_uncoded(param(*shape), "matrix") is None or not coded


def test_codes_follow_rows_in_memory():
    images = torch.empty(32, 16, 3, 3)
    layouts = {
        "channels_last": (images.to(memory_format=torch.channels_last), True),
        "transposed": (torch.empty(64, 80).t(), False),
        "sliced": (torch.empty(64, 80)[:, :70], False),
        "every other row": (torch.empty(128, 80)[::2], False),
        "expanded": (torch.empty(1, 80).expand(64, 80), False),
        "transposed within rows": (torch.empty(16, 20, 30).transpose(1, 2), True),
    }
    for p, coded in layouts.values():
        assert moments(EIGHT, p) == (CODES if coded else UNCODED)
        assert coded == has_dense_rows(p)


def test_what_has_no_blocks_is_not_coded():
    subclass = torch.Tensor._make_subclass(Marked, torch.zeros(64, 64))
    flattened = torch.nn.Parameter(torch.zeros(64, 64))
    flattened._fsdp_flattened = True
    sparse = torch.zeros(64, 64).to_sparse()
    for p in (subclass, flattened, sparse):
        assert moments(EIGHT, p) == UNCODED
    assert "Marked" in EIGHT.why_uncoded(subclass, "matrix")
    with torch._subclasses.FakeTensorMode():
        assert moments(EIGHT, torch.empty(64, 64)) == CODES


@given(st.lists(st.integers(0, 130), min_size=0, max_size=4), st.sampled_from([F32, BF16, F16, F64]))
@settings(max_examples=100, deadline=None)
def test_a_side_can_be_made_wherever_codes_are_chosen(shape, dtype):
    p = param(*shape, dtype=dtype)
    kept = EIGHT.formats_of(p, None)
    assert kept.exp_avg.zeros(p).values.shape == p.shape
    if kept.exp_avg.side_dtype is not None:
        assert kept.exp_avg.nbytes(p.shape) + kept.exp_avg_sq.nbytes(p.shape) < 4 * p.numel()


# ---- Single roles and names


def test_a_name_wins_over_a_role_and_later_names_over_earlier_ones():
    precision = Precision(state_dtype="8bit", state_roles={"*.q.*": BF16, "*.0.*": "8bit", "matrix": F32})
    p = param(64, 64)
    assert precision.state_dtype_of("matrix", ("h.1.k.weight",)) == F32
    assert precision.state_dtype_of("matrix", ("h.1.q.weight",)) == BF16
    assert precision.state_dtype_of("matrix", ("h.0.q.weight",)) == "8bit"
    assert precision.state_dtype_of("embedding", ("wte",)) == "8bit"
    assert moments(precision, p, "norm", ("h.0.norm.weight",)) == CODES  # by name, whatever it is
    assert moments(precision, p, None, ("h.0.k.weight",)) == CODES


def test_any_name_of_a_tied_parameter_counts():
    precision = Precision(state_roles={"head.*": "8bit"})
    assert moments(precision, param(64, 64), "tied_embedding", ("wte.weight", "head.weight")) == CODES


def test_a_role_is_no_glob():
    assert Precision(state_roles={"bias": BF16}).state_dtype_of("matrix", ("bias",)) is None


def test_what_was_asked_for_can_be_copied_and_compared():
    precision = Precision("split", True, "8bit", {"embedding": "8bit", "*.head.*": F32}, seed=2**64 - 1)
    assert pickle.loads(pickle.dumps(precision)) == copy.deepcopy(precision) == precision
    assert precision != EIGHT
    assert precision.has_codes
    assert not Precision(state_dtype=BF16).has_codes


# ---- DTensors: all processes choose alike, and none holds a part of a block


@contextlib.contextmanager
def as_rank(rank, world_size):
    """This process as one of several, none of which is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensor(shape, mesh, placements, stride=None):
    local_shape, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        torch.empty(local_shape, dtype=BF16),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=stride or whole.stride(),
    )


def on_every_rank(shape, sizes, placements, stride=None):
    """For each process: how moments are kept, and the shapes and offsets of its part and of its scales."""
    n = torch.Size(sizes).numel()
    for rank in range(n):
        with as_rank(rank, n):
            mesh = init_device_mesh("cpu", sizes)
            p = dtensor(shape, mesh, placements, stride)
            found = moments(EIGHT, p)
            scales = (shape[0], -(-torch.Size(shape[1:]).numel() // BLOCK))
            shapes = (shape, scales) if found == CODES else ()
            yield found, [compute_local_shape_and_global_offset(s, mesh, placements) for s in shapes]


@pytest.mark.parametrize(
    ("sizes", "placements", "shape", "coded"),
    [
        ((2,), [Replicate()], (64, 64), True),
        ((4,), [Shard(0)], (64, 64), True),
        ((4,), [Shard(0)], (66, 64), True),  # uneven
        ((4,), [Shard(0)], (3, 2000), True),  # and one process with nothing
        ((2, 2), [Replicate(), Shard(0)], (64, 64), True),
        ((2,), [Shard(1)], (64, 256), True),
        ((2,), [Shard(1)], (64, 250), False),
        ((2,), [Shard(1)], (64, 320), False),
        ((3,), [Shard(1)], (64, 384), True),
        ((3,), [Shard(1)], (64, 512), False),
        ((4,), [Shard(1)], (64, 510), True),  # the last has 126 columns
        ((2, 2), [Shard(0), Shard(1)], (64, 256), True),
        ((2, 2), [Shard(1), Shard(1)], (64, 512), True),
        ((2, 2), [Shard(1), Shard(1)], (64, 256), False),
        ((2,), [Shard(1)], (16, 16, 4, 4), True),
        ((2,), [Shard(1)], (16, 16, 3, 3), False),
        ((2,), [Shard(2)], (16, 16, 256), False),
        ((2,), [Partial()], (64, 64), False),
        ((4,), [Shard(0)], (8, 8), False),
    ],
    ids=str,
)
def test_codes_by_placement(sizes, placements, shape, coded):
    assert {found for found, _ in on_every_rank(shape, sizes, placements)} == {CODES if coded else UNCODED}


def test_the_whole_tensor_decides_and_not_a_shard_of_it():
    """Each of 64 processes has one row of 64 values."""
    assert {found for found, _ in on_every_rank((64, 64), (64,), [Shard(0)])} == {CODES}


@pytest.mark.parametrize(
    ("shape", "placement", "stride"),
    [((64, 128), Replicate(), (1, 64)), ((16, 128, 4, 4), Shard(1), (2048, 1, 512, 128))],
    ids=["transposed", "channels_last by channels"],
)
def test_the_memory_of_the_whole_tensor_decides(shape, placement, stride):
    assert {found for found, _ in on_every_rank(shape, (2,), [placement], stride)} == {UNCODED}


@given(
    st.lists(st.sampled_from([Replicate(), Shard(0), Shard(1), Shard(2)]), min_size=1, max_size=2),
    st.sampled_from([(2, 1), (2, 2), (3, 2), (4, 1)]),
    st.tuples(st.integers(33, 36), st.sampled_from([1, 4, 6, 8, 16]), st.sampled_from([128, 160, 192, 200])),
)
@settings(max_examples=40, deadline=None)
def test_no_process_holds_a_part_of_a_block(placements, sizes, shape):
    """Shards of the scales, made by torch, belong to the blocks of the shards of the tensor."""
    found = list(on_every_rank(shape, sizes[: len(placements)], placements))
    assert len({formats for formats, _ in found}) == 1
    for _, parts in found:
        if not parts:
            continue
        (local, offset), (local_scales, scale_offset) = parts
        if torch.Size(local).numel():
            assert offset[1] * shape[2] == BLOCK * scale_offset[1]
            assert (local_scales[0], scale_offset[0]) == (local[0], offset[0])
            assert local_scales[1] == -(-local[1] * shape[2] // BLOCK)
