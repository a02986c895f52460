"""The norm of all gradients: sums over launches, devices and processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """A mesh and the domains whose sums are reduced over it."""

    def __init__(self, mesh: Any, params_device: torch.device) -> None:
        self._mesh = mesh
        # Parameters may be offloaded to the CPU, which the mesh's groups need not serve.
        is_theirs = params_device.type == mesh.device_type
        self.device = params_device if is_theirs else torch.device(mesh.device_type)
        self.domains: list[tuple[int, int]] = []  # domain, number of processes that have each of its values

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


class Reduction:
    """Sums over the processes that hold an optimizer's parameters together.

    Built from all parameters, with and without gradients, so that it is the same in all processes of a mesh,
    and they enter the same collectives in the same order.

    Args:
        params: All parameters of the optimizer.

    Attributes:
        domain_of: For each parameter its domain, a number below `n_domains`. Squares of a domain are reduced
            together, so they may be summed first. Domain 0 is that of plain tensors.
        n_domains: Number of domains.
        is_local: Whether no parameter is a DTensor.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._device = params[0].device if params else None
        self.domain_of: list[int] = []
        domains: dict[tuple[Any, int], int] = {(None, 1): 0}
        meshes: dict[Any, _MeshSum] = {}
        for p in params:
            spec: Any = getattr(p, "_spec", None)
            mesh, copies = (None, 1) if spec is None else (spec.mesh, _copies(spec))
            if (mesh, copies) not in domains:
                domain = domains[mesh, copies] = len(domains)
                meshes.setdefault(mesh, _MeshSum(mesh, p.device)).domains.append((domain, copies))
            self.domain_of.append(domains[mesh, copies])
        self._meshes = list(meshes.values())  # in the order in which the parameters name them
        self.n_domains = len(domains)
        self.is_local = not meshes

    def __call__(
        self, sums: Sequence[Tensor | None], found_inf: Tensor, norm_group: NormGroup | None
    ) -> tuple[Tensor, Tensor]:
        """Sum, with one all-reduce per mesh, or per dimension of a mesh that has no group of its own.

        The host waits only where a mesh's device is not that of `found_inf`.

        Args:
            sums: For each domain the sum of squares in this process, 0-dim, on any device; None: 0.
            found_inf: 0-dim, of the dtype and on the device of the results.
            norm_group: Adds up over processes that hold other parameters.

        Returns:
            The sum of squares and the sum of `found_inf`, 0-dim, the same in all processes.
        """
        total = torch.zeros_like(found_inf) if (own := sums[0]) is None else own.to(found_inf)
        for mesh in self._meshes:
            here = torch.zeros((), dtype=found_inf.dtype, device=mesh.device)
            for domain, copies in mesh.domains:
                if (squares := sums[domain]) is not None:
                    here = here + squares.to(here) / copies
            wire = torch.stack([here, found_inf.to(mesh.device)])
            for group in mesh.groups:
                dist.all_reduce(wire, group=group)
            wire = wire.to(found_inf.device)
            total, found_inf = total + wire[0], wire[1]
        if norm_group is not None:
            total, found_inf = norm_group(torch.stack([total, found_inf]), self._device)
        return total, found_inf


def _copies(spec: Any) -> int:
    """How many processes of its mesh hold each value of a DTensor."""
    sizes = zip(spec.mesh.shape, spec.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())
