"""The norm of all gradients: sums over launches, devices and processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..device import scalar_dtype


class NormGroup:
    """Sums over the processes that hold the other parameters.

    A deep copy is the same object. Pickling a process group is refused: another process would not know it,
    and without it would clip by a norm of its own.

    Args:
        group: A process group that this process belongs to, or a function from a tensor of float64 to the
            sum of such tensors over the processes.

    Raises:
        TypeError: `group` is neither.
    """

    def __init__(self, group: dist.ProcessGroup | Callable[[Tensor], Tensor]) -> None:
        self._is_function = callable(group)
        if not self._is_function and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "norm_process_group must be a process group that this process belongs to, a callable or "
                f"None, got {group!r}"
            )
        self.group: Any = group

    def __call__(self, sums: Tensor, device: torch.device | None) -> Tensor:
        """Sum `sums` over the processes.

        Args:
            sums: float64 (n,).
            device: Where the parameters of this process are; None: it has none.
        """
        if not self._is_function:
            wire = sums.to(_device_of(self.group, device), copy=True)
            dist.all_reduce(wire, group=self.group)
            return wire.to(sums.device)
        total = self.group(sums)
        if not isinstance(total, Tensor) or total.shape != sums.shape:
            found = tuple(total.shape) if isinstance(total, Tensor) else f"a {type(total).__name__}"
            raise TypeError(
                f"the callable norm_process_group must return a tensor of shape {tuple(sums.shape)}, the sum "
                f"over all processes of what it is given, got {found}"
            )
        return total.to(sums)

    def __deepcopy__(self, memo: dict[int, Any]) -> NormGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_function:
            raise TypeError(
                "an optimizer with a process group cannot be pickled: set norm_process_group = None before, "
                "and to the group of the process that loads it after. Its state_dict can be saved as it is."
            )
        return NormGroup, (self.group,)


def _device_of(group: Any, device: torch.device | None) -> torch.device:
    """The device for collectives of a group, for parameters on `device`; None: this process has none."""
    served = {d.type for d in group._device_types}
    if device is not None and device.type in served:
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type in served:
        return torch.device(accelerator.type)
    return torch.device("cpu")


class _MeshSum:
    """A mesh and the sum groups whose sums are reduced over it."""

    def __init__(self, mesh: Any, params_device: torch.device) -> None:
        self._mesh = mesh
        # Parameters may be offloaded to the CPU, which the mesh's groups need not serve.
        is_theirs = params_device.type == mesh.device_type
        self.device = params_device if is_theirs else torch.device(mesh.device_type)
        # Sum groups, and the positions of parameters, each with how many processes have each of its values.
        self.sum_groups: list[tuple[int, int]] = []
        self.params: list[tuple[int, int]] = []

    @functools.cached_property
    def groups(self) -> list[Any]:
        """The process groups to sum over in turn, in order to sum over the mesh.

        No group is created: that would be a collective of all processes, and not all need take part.
        """
        mesh = self._mesh
        if mesh.ndim == 1:
            return [mesh.get_group()]
        if mesh.size() == dist.get_world_size():
            return [dist.group.WORLD]
        return [mesh.get_group(dim) for dim in range(mesh.ndim)]


class Sums:
    """Where launches leave sums of squares, and how these become the norm of all gradients.

    Args:
        reduction: Sums over processes.

    Attributes:
        by_device: For each device a float64 vector of all sums on it.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.by_device: dict[torch.device, Tensor] = {}
        self._reduction = reduction
        self._parts: list[list[Tensor]] = [[] for _ in range(reduction.n_sum_groups)]

    def add(self, device: torch.device, sum_groups: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Make room on a device.

        Args:
            device: The device; a new one.
            sum_groups: Those that each launch has gradients of.

        Returns:
            For each launch a tensor of one element for each of its sum groups.
        """
        # In the order of sum groups, so that the sums of each are neighbours.
        parts = sorted((group, launch) for launch, groups in enumerate(sum_groups) for group in groups)
        sums = torch.zeros(len(parts), dtype=scalar_dtype(device), device=device)
        place = {part: sums[i : i + 1] for i, part in enumerate(parts)}
        for group in {group for group, _ in parts}:
            mine = [i for i, part in enumerate(parts) if part[0] == group]
            self._parts[group].append(sums[mine[0] : mine[-1] + 1])
        self.by_device[device] = sums
        return [[place[group, launch] for group in groups] for launch, groups in enumerate(sum_groups)]

    def totals(
        self, is_summed: bool, found_inf: Tensor | None, norm_group: NormGroup | None
    ) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """Sum the squares and `found_inf` over devices and processes.

        Args:
            is_summed: Whether launches have left their sums.
            found_inf: One element on any device: what a GradScaler found in this process.
            norm_group: Sums over the processes that hold the other parameters.

        Returns:
            For each device, a float64 vector whose sum is the sum of squares of all gradients, empty without
            `is_summed`; and `found_inf`, one element. The host waits only where an accelerator's sum has to
            reach the CPU or the other way round.
        """
        here = self._reduction.is_local and norm_group is None
        if here and (not is_summed or len(self.by_device) == 1):
            return (self.by_device if is_summed else {}), found_inf
        if not is_summed and found_inf is None:
            return {}, None
        own = next(iter(self.by_device.values()))
        flag = own.new_zeros(()) if found_inf is None else torch.as_tensor(found_inf).to(own)
        by_group = [self._sum_of(parts, own) if is_summed else None for parts in self._parts]
        total, flag = self._reduction(by_group, flag.reshape(()), norm_group)
        devices = self.by_device if is_summed else ()
        sums = {device: total.to(device, self.by_device[device].dtype).reshape(1) for device in devices}
        return sums, found_inf if here else flag

    @staticmethod
    def _sum_of(parts: Sequence[Tensor], own: Tensor) -> Tensor | None:
        """The sum over a sum group in this process, on the device of `own`; None if it has no gradients."""
        sums = [part.sum().to(own) for part in parts]
        return functools.reduce(torch.add, sums) if sums else None


class Reduction:
    """Sums over the processes that hold an optimizer's parameters together.

    Built from all parameters, with and without gradients, so that it is the same in all processes of a mesh,
    and they enter the same collectives in the same order.

    Args:
        params: All parameters of the optimizer.

    Attributes:
        sum_group_of: For each parameter its sum group, a number below `n_sum_groups`. Squares of a sum group
            are reduced over the same processes, so they may be summed first. Plain tensors have group 0.
        n_sum_groups: Number of sum groups.
        is_local: Whether no parameter is a DTensor.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._device = params[0].device if params else None
        self.sum_group_of: list[int] = []
        sum_groups: dict[tuple[Any, int], int] = {(None, 1): 0}
        meshes: dict[Any, _MeshSum] = {}
        for p in params:
            spec: Any = getattr(p, "_spec", None)
            mesh, copies = (None, 1) if spec is None else (spec.mesh, _copies(spec))
            if (mesh, copies) not in sum_groups:
                sum_group = sum_groups[mesh, copies] = len(sum_groups)
                meshes.setdefault(mesh, _MeshSum(mesh, p.device)).sum_groups.append((sum_group, copies))
            if spec is not None:
                meshes[mesh].params.append((len(self.sum_group_of), copies))
            self.sum_group_of.append(sum_groups[mesh, copies])
        self._meshes = list(meshes.values())  # in the order in which the parameters name them
        self.n_sum_groups = len(sum_groups)
        self.is_local = not meshes

    def __call__(
        self, sums: Sequence[Tensor | None], found_inf: Tensor, norm_group: NormGroup | None
    ) -> tuple[Tensor, Tensor]:
        """Sum, with one all-reduce per mesh, or per dimension of a mesh that has no group of its own.

        The host waits only where a mesh's device is not that of `found_inf`.

        Args:
            sums: For each sum group the sum of squares in this process, 0-dim, on any device; None: 0.
            found_inf: 0-dim, of the dtype and on the device of the results.
            norm_group: Adds up over processes that hold other parameters.

        Returns:
            The sum of squares and the sum of `found_inf`, 0-dim, the same in all processes.
        """
        total = torch.zeros_like(found_inf) if (own := sums[0]) is None else own.to(found_inf)
        for mesh in self._meshes:
            here = torch.zeros((), dtype=found_inf.dtype, device=mesh.device)
            for sum_group, copies in mesh.sum_groups:
                if (squares := sums[sum_group]) is not None:
                    here = here + squares.to(here) / copies
            wire = torch.stack([here, found_inf.to(mesh.device)])
            for group in mesh.groups:
                dist.all_reduce(wire, group=group)
            wire = wire.to(found_inf.device)
            total, found_inf = total + wire[0], wire[1]
        if norm_group is not None:
            total, found_inf = norm_group(torch.stack([total, found_inf]), self._device)
        return total, found_inf

    def of_each(self, sums: Tensor) -> Tensor:
        """Sum over processes what is known of each parameter; a collective for each mesh.

        Args:
            sums: float64 (number of parameters, any), on the host: sums over the part in this process.

        Returns:
            The same of the whole parameters.
        """
        total = sums.clone()
        for mesh in self._meshes:
            positions = torch.tensor([position for position, _ in mesh.params], device="cpu")
            copies = torch.tensor([float(copies) for _, copies in mesh.params], device="cpu")
            wire = (sums[positions] / copies[:, None]).to(mesh.device)
            for group in mesh.groups:
                dist.all_reduce(wire, group=group)
            total[positions] = wire.cpu()
        return total

    def largest_of_each(self, values: Tensor) -> Tensor:
        """The largest over processes of what is known of each parameter; a collective for each mesh.

        Args:
            values: float64 (number of parameters,), on the host. NaN counts as infinity.
        """
        largest = values.nan_to_num(math.inf, math.inf)
        for mesh in self._meshes:
            positions = torch.tensor([position for position, _ in mesh.params], device="cpu")
            wire = largest[positions].to(mesh.device)
            for group in mesh.groups:
                dist.all_reduce(wire, dist.ReduceOp.MAX, group=group)
            largest[positions] = wire.cpu()
        return largest


def _copies(spec: Any) -> int:
    """How many processes of its mesh hold each value of a DTensor."""
    sizes = zip(spec.mesh.shape, spec.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())
