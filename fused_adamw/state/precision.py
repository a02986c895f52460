"""In which format a parameter and its moments are kept, by what was asked for. It holds no tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..dtensors import is_flattened, is_partial
from ..formats import BLOCK, FORMATS, Format, has_dense_rows, memory_order, plain_format
from ..groups import Role
from ..layout import is_plain

StateDtype: TypeAlias = "torch.dtype | Literal['8bit']"

CODED_ROLES = frozenset(
    {Role.MATRIX, Role.CONVOLUTION, Role.INPUT, Role.OUTPUT, Role.RECURRENCE, Role.ADAPTER_MATRIX}
)
_CODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ROW = 32  # shorter rows spend too much on scales
_LEAST_NUMEL = 4096  # smaller tensors save nothing worth having


class Kept(NamedTuple):
    """How a parameter and its moments are kept. The maximum of exp_avg_sq is kept as exp_avg is."""

    param: Format
    exp_avg: Format
    exp_avg_sq: Format


@dataclass(frozen=True)
class Precision:
    """What was asked for.

    Attributes:
        master_weights: "split": bfloat16 parameters have a float32 master in two halves.
        stochastic_rounding: Of bfloat16 parameters and second moments; None: of second moments, if a state in
            bfloat16 or 8 bits was asked for.
        state_dtype: How moments are kept; None: in the parameter's dtype.
        state_roles: The same for single roles, and for parameters by a glob over names, which wins.
        seed: Of the noise.
    """

    master_weights: Literal["split"] | None = None
    stochastic_rounding: bool | None = None
    state_dtype: StateDtype | None = None
    state_roles: Mapping[str, StateDtype] = field(default_factory=dict)
    seed: int = 0

    @property
    def rounds_params(self) -> bool:
        """Whether bfloat16 parameters without a master are rounded stochastically."""
        return self.stochastic_rounding is True

    @property
    def rounds_moments(self) -> bool:
        """Whether second moments in bfloat16 are rounded stochastically."""
        if self.stochastic_rounding is not None:
            return self.stochastic_rounding
        return any(asked in (torch.bfloat16, "8bit") for asked in self._asked_anywhere())

    @property
    def has_codes(self) -> bool:
        """Whether any moments may be kept in 8 bits."""
        return "8bit" in self._asked_anywhere()

    def _asked_anywhere(self) -> list[StateDtype | None]:
        return [self.state_dtype, *self.state_roles.values()]

    def state_dtype_of(self, role: str | None, names: Sequence[str] = ()) -> StateDtype | None:
        """What was asked for the moments of a parameter.

        Args:
            role: What it is for; None: not known.
            names: Its names, several if it is tied.
        """
        key = self._key_of(role, names)
        return self.state_dtype if key is None else self.state_roles[key]

    def _key_of(self, role: str | None, names: Sequence[str]) -> str | None:
        """The key of `state_roles` that decides: the last glob that matches, else the role."""
        found = role if role in self.state_roles else None
        for key in self.state_roles:
            if not is_role(key) and any(fnmatchcase(name, key) for name in names):
                found = key
        return found

    def refusal(self, p: Tensor) -> str | None:
        """None if a parameter can be kept as was asked, else why not."""
        if self.master_weights is None or torch.finfo(p.dtype).bits >= 32:
            return None
        if p.dtype != torch.bfloat16:
            return f"is {p.dtype}: master_weights='split' is for bfloat16 parameters; float32 needs no master"
        kind = type(_local(p))
        if not _is_plain(kind):
            return f"is a {kind.__name__}: master_weights='split' is for parameters in plain memory"
        return None

    def formats_of(self, p: Tensor, role: str | None, names: Sequence[str] = ()) -> Kept:
        """How a parameter and its moments are to be kept.

        Processes that hold parts of a DTensor get the same answer: it depends on the shape of the whole, on
        its placements and on memory layout.

        Args:
            p: The parameter; none of its values is read.
            role: What it is for; None: not known, so its shape decides.
            names: Its names, several if it is tied.

        Raises:
            ValueError: It cannot have the master that was asked for.
        """
        if (refusal := self.refusal(p)) is not None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} {refusal}")
        asked, param = self.state_dtype_of(role, names), plain_format(p.dtype)
        if p.dtype == torch.bfloat16 and self.master_weights is not None:
            param = FORMATS["bfloat16_split"]
        elif p.dtype == torch.bfloat16 and self.rounds_params:
            param = FORMATS["bfloat16_stochastic"]
        if asked == "8bit" and self.why_uncoded(p, role, names) is None:
            return Kept(param, FORMATS["root_signed"], FORMATS["root_unsigned"])
        exp_avg = exp_avg_sq = plain_format(_moment_dtype(p, asked))
        if exp_avg_sq.dtype == torch.bfloat16 and self.rounds_moments:
            exp_avg_sq = FORMATS["bfloat16_stochastic"]
        return Kept(param, exp_avg, exp_avg_sq)

    def why_uncoded(self, p: Tensor, role: str | None, names: Sequence[str] = ()) -> str | None:
        """None if moments for which 8 bits were asked are kept in 8 bits, else why not.

        Args:
            p: As for `formats_of`, as is `role`.
            role: A role that 8 bits were asked for by name has them, whatever it is.
            names: As for `formats_of`.
        """
        if p.dtype not in _CODED_DTYPES:
            return f"moments of {p.dtype} keep its precision"
        if role is not None and role not in CODED_ROLES and self._key_of(role, names) is None:
            return f"8 bits are not for the role {role}"
        return _why_no_blocks(p)

    def reason(self, p: Tensor, role: str | None, names: Sequence[str] = ()) -> str:
        """Why the moments of a parameter are kept as they are, in a few words; arguments as `formats_of`."""
        key = self._key_of(role, names)
        asked = self.state_dtype_of(role, names)
        if asked is None or not p.is_floating_point():
            return "as the parameter"
        by = "state_dtype" if key is None else f"state_roles[{key!r}]"
        uncoded = self.why_uncoded(p, role, names) if asked == "8bit" else None
        return by if uncoded is None else f"{by}, but {uncoded}"

    def is_nearest_by_default(self, p: Tensor, role: str | None, names: Sequence[str] = ()) -> bool:
        """Whether second moments are in bfloat16 and rounded to nearest, and nobody asked for it."""
        if p.dtype != torch.bfloat16 or self.stochastic_rounding is not None:
            return False
        return self.formats_of(p, role, names).exp_avg_sq == FORMATS["bfloat16"]


def is_role(key: str) -> bool:
    """Whether a key of `state_roles` is a role, and no glob over names."""
    return key in Role._value2member_map_


def _moment_dtype(p: Tensor, asked: StateDtype | None) -> torch.dtype:
    """The dtype of moments that are not kept in 8 bits."""
    if not p.is_floating_point() or asked is None:
        return p.dtype
    if isinstance(asked, torch.dtype):
        return asked
    return p.dtype if p.dtype == torch.float64 else torch.bfloat16


def _local(p: Tensor) -> Tensor:
    local: Tensor = getattr(p, "_local_tensor", p)
    return local


def _is_plain(kind: type) -> bool:
    return is_plain(kind) or issubclass(kind, FakeTensor)


# ---- Blocks: rows of the whole tensor, cut into BLOCK neighbours


def _why_no_blocks(p: Tensor) -> str | None:
    """None if every process holds whole blocks of a tensor's rows, and enough of them, else why not."""
    local = _local(p)
    if not _is_plain(type(local)):
        return f"a {type(local).__name__} has no blocks of neighbours"
    if p.layout is not torch.strided or p.is_nested:
        return "it is not strided memory"
    if is_flattened(p):
        return "FSDP1 flattens it"
    if p.dim() < 2:
        return f"it has {p.dim()} dimension{'s' * (p.dim() != 1)}, so no rows"
    if p.numel() < _LEAST_NUMEL:
        return f"it has {p.numel():,} values, fewer than {_LEAST_NUMEL:,}"
    if (columns := p.numel() // p.shape[0]) < _LEAST_ROW:
        return f"its rows have {columns} values, fewer than {_LEAST_ROW}"
    whole = torch.empty_strided(p.shape, p.stride(), device="meta") if local is not p else p
    if not has_dense_rows(whole) or not has_dense_rows(local):
        return f"its rows do not follow each other in memory: strides {p.stride()}"
    return _why_blocks_are_cut(p, whole)


def _why_blocks_are_cut(p: Tensor, whole: Tensor) -> str | None:
    """None if no shard of a DTensor begins inside a block, and scales are sharded alike, else why not."""
    spec: Any = getattr(p, "_spec", None)
    if spec is None:
        return None
    if is_partial(p):
        return "processes hold addends of it"
    across = [
        (size, placement)
        for size, placement in zip(spec.mesh.shape, spec.placements, strict=True)
        if not placement.is_replicate() and placement.dim != 0
    ]
    if not across:
        return None
    said = f"its rows are sharded as {spec.placements}, not at multiples of {BLOCK} values"
    if not all(placement.is_shard(1) for _, placement in across) or memory_order(whole)[1] != 1:
        return said
    inner = math.prod(p.shape[2:])
    sizes = [size for size, _ in across]
    starts = [inner * start for start in _starts(p.shape[1], sizes)]
    n_blocks = -(-p.shape[1] * inner // BLOCK)
    of_scales = [BLOCK * start for start in _starts(n_blocks, sizes)]
    ends = p.shape[1] * inner
    return None if starts == [min(start, ends) for start in of_scales] else said


def _starts(size: int, parts: Sequence[int]) -> list[int]:
    """Where the shards of a dimension begin that is sharded over mesh dimensions of these sizes, in turn."""
    intervals = [(0, size)]
    for n in parts:
        cut = []
        for begin, end in intervals:
            step = -(-(end - begin) // n)  # as torch.chunk
            cut += [(min(begin + i * step, end), min(begin + (i + 1) * step, end)) for i in range(n)]
        intervals = cut
    return [begin for begin, _ in intervals]
