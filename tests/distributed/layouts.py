"""Parameters spread over processes in many ways, the same in one process, and gradients for both."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Over 4 processes the second and the fourth leave some of them with nothing, the last is not even a vector.
SHAPES = [(7, 6), (3,), (8, 4), (2, 5), (9, 8), ()]


def values(shape, seed):
    """Multiples of 1/16 between -1 and 1: sums of their squares are exact in float64, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator).float() / 16


def whole_params(device="cpu"):
    """The parameters in one process."""
    return [nn.Parameter(values(shape, i).to(device)) for i, shape in enumerate(SHAPES)]


def whole_grads(step, device="cpu"):
    """Their gradients."""
    return [values(shape, 1000 + 100 * step + i).to(device) for i, shape in enumerate(SHAPES)]


def _sharded(mesh_of):
    return [(mesh_of, [Shard(0)] if shape else [Replicate()]) for shape in SHAPES]


def one_mesh(device):
    """As FSDP2 with one mesh."""
    return _sharded(init_device_mesh(device, (dist.get_world_size(),)))


def replicated(device):
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    return [(mesh, [Replicate()])] * len(SHAPES)


def some_replicated(device):
    """As tensor parallelism: norms replicated, matrices sharded by rows or columns."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    return [(mesh, [Shard(i % len(s))] if len(s) > 1 else [Replicate()]) for i, s in enumerate(SHAPES)]


def _square(device):
    n = dist.get_world_size()
    shape = (2, n // 2)
    return init_device_mesh(device, shape, mesh_dim_names=("a", "b"))


def hsdp(device):
    """Replicated over one dimension of the mesh, sharded over the other."""
    mesh = _square(device)
    return [(mesh, [Replicate(), Shard(0) if shape else Replicate()]) for shape in SHAPES]


def fsdp_and_tp(device):
    """Matrices sharded over both dimensions of the mesh, vectors over one."""
    mesh = _square(device)
    placements = {0: [Replicate(), Replicate()], 1: [Shard(0), Replicate()], 2: [Shard(0), Shard(1)]}
    return [(mesh, placements[len(shape)]) for shape in SHAPES]


def two_meshes(device):
    """Each parameter on one of two meshes that cross."""
    mesh = _square(device)
    parts = [mesh["b"], mesh["a"]]
    return [(parts[i % 2], [Shard(0)] if shape else [Replicate()]) for i, shape in enumerate(SHAPES)]


def mixed(device):
    """Plain parameters among those of two meshes."""
    layout = two_meshes(device)
    return [None if i in (0, 4) else where for i, where in enumerate(layout)]


def part_of_the_world(device):
    """On a mesh of two dimensions that has no group of its own: the processes of one of two halves."""
    shape = (2, dist.get_world_size() // 2, 1)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("half", "a", "b"))["a", "b"]
    return [(mesh, [Shard(0), Shard(1)] if len(s) > 1 else [Replicate(), Replicate()]) for s in SHAPES]


LAYOUTS = {
    f.__name__: f
    for f in (
        one_mesh,
        replicated,
        some_replicated,
        hsdp,
        fsdp_and_tp,
        two_meshes,
        mixed,
        part_of_the_world,
    )
}
# All-reduces that a step needs.
COLLECTIVES = dict.fromkeys(LAYOUTS, 1) | {"two_meshes": 2, "mixed": 2, "part_of_the_world": 2}


def place(t, where):
    """A tensor on a mesh, or as it is."""
    return t if where is None else distribute_tensor(t, *where)


def placed_like(whole, p):
    """A whole tensor, the same in all processes, distributed as a parameter is."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def placed_params(layout, device="cpu"):
    """The parameters, laid out."""
    return [
        nn.Parameter(place(p.detach(), where)) for p, where in zip(whole_params(device), layout, strict=True)
    ]


def give_grads(params, layout, step, without=(), device="cpu"):
    """The gradients of a step, laid out; none for the parameters `without`."""
    for i, (p, where, grad) in enumerate(zip(params, layout, whole_grads(step, device), strict=True)):
        p.grad = None if i in without else place(grad, where)


def gathered(t):
    """The whole of a tensor, in numpy."""
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).cpu().numpy().copy()


def held_bytes(t):
    """What this process holds of a tensor, to compare bit for bit."""
    t = t.detach()
    return (t.to_local() if isinstance(t, DTensor) else t).cpu().numpy().tobytes()


class Collectives(TorchDispatchMode):
    """Lists the collectives that are entered inside."""

    def __enter__(self):
        self.entered = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.entered.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))
