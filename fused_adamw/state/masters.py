"""Float32 masters of bfloat16 parameters: the parameter is their upper half, its state has the lower one."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..dtensors import is_dtensor, local_tensors, wrapped
from ..fields import RESIDUAL
from ..formats import FORMATS, Field
from ..groups import canonical
from .contents import missing_state
from .loading import Checkpointed

_SPLIT = FORMATS["bfloat16_split"]


class Mastered(Checkpointed):
    """The part of the optimizer that gives its masters away and takes others."""

    @torch.no_grad()
    def resync_master(self) -> None:
        """Let every master be what its parameter is: sets residuals to zero, which changes no parameter.

        Weights that are written from outside win over the master anyway, but what is left of the old master
        stays: half a unit in the last place at most.
        """
        for p in self._with(RESIDUAL):
            self.state[p][RESIDUAL].zero_()

    @_disable_dynamo
    @torch.inference_mode(False)  # tensors made in inference mode could not be updated outside of it
    @torch.no_grad()
    def load_master(self, state_dict: Mapping[str, Any]) -> None:
        """Take masters from the weights of a model in float32, as its `state_dict()` has them.

        Mutates bfloat16 parameters, which become the rounded weights, and their residuals. All else in
        `state_dict` is left to `model.load_state_dict`. Call it after `load_state_dict` of the optimizer,
        which loads residuals as well.

        Args:
            state_dict: Of the model: a tensor of any floating dtype for every parameter that has a master, of
                its shape, under its name or another of its names if it is tied. DTensors and whole tensors
                both do for a parameter that is sharded.

        Raises:
            ValueError: The optimizer was built without `master_weights`; a parameter has no name, or is not
                in `state_dict`. Nothing has changed then.
            RuntimeError: A weight has another shape than its parameter. Nothing has changed then.
        """
        if self.master_weights is None:
            raise ValueError("the optimizer has no masters: build it with master_weights='split'")
        found = {canonical(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
        given: list[tuple[Tensor, dict[str, Any], Tensor]] = []
        groups = [group for group in self.param_groups for _ in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        columns = (groups, params, self._kept(), self._all_purposes(), self._names())
        for group, p, kept, purpose, name in zip(*columns, strict=True):
            if kept.param.side_dtype is None:
                continue
            weight = next((found[each] for each in purpose.names if each in found), None)
            if weight is None:
                raise ValueError(
                    f"parameter {name} is not in the state_dict: expected a weight under "
                    f"{' or '.join(purpose.names) or 'its name, but it has none: build it from the model'}"
                )
            if weight.shape != p.shape:
                raise RuntimeError(
                    f"the weight of parameter {name} is {tuple(weight.shape)}, expected {tuple(p.shape)}"
                )
            state = self.state.get(p, {})
            given.append((p, {**state, **missing_state(state, p, group["amsgrad"], kept)}, weight))
        for p, state, weight in given:
            self.state.setdefault(p, {}).update(state)
            local, residual, mine = local_tensors((p.detach(), state[RESIDUAL], _placed(weight, p)))
            Field(_SPLIT, local, residual).write(mine.to(local.device, torch.float32))

    @_disable_dynamo
    @torch.no_grad()
    def master_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The `state_dict` of a model, with its weights in float32: masters where there are any.

        Args:
            model: The model that the optimizer's parameters belong to.

        Returns:
            `model.state_dict()` with float32 in the place of bfloat16 and float16 weights, which are new
            tensors; all else is the model's own. Tied weights are one tensor under all of their names.

        Raises:
            ValueError: A parameter that has a master is not among the values of `model.state_dict()`.
        """
        return self._weights_of(model, set(map(id, self._with(RESIDUAL))), self._in_float32)

    def _weights_of(
        self, model: nn.Module, expected: Container[int], weight_of: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """The `state_dict` of a model with other weights.

        Args:
            model: The model.
            expected: Ids of parameters that have to be in it.
            weight_of: Called once for each parameter.

        Raises:
            ValueError: One of `expected` is missing.
        """
        weights: dict[int, Tensor] = {}
        found: dict[str, Any] = {}
        for key, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if id(value) not in weights:
                    weights[id(value)] = weight_of(value)
                found[key] = weights[id(value)]
            else:
                found[key] = value.detach() if isinstance(value, Tensor) else value
        params = (p for group in self.param_groups for p in group["params"])
        for p, name in zip(params, self._names(), strict=True):
            if id(p) in expected and id(p) not in weights:
                raise ValueError(f"parameter {name} is not in the model's state_dict")
        return found

    def _in_float32(self, p: Tensor) -> Tensor:
        if p.dtype not in (torch.bfloat16, torch.float16):
            return p.detach()
        residual = self.state.get(p, {}).get(RESIDUAL)
        if residual is None:
            return p.detach().float()
        return wrapped(Field(_SPLIT, *local_tensors((p.detach(), residual))).load(), p)

    def _with(self, key: str) -> list[Tensor]:
        """The parameters whose state has a key, each once."""
        params = {id(p): p for group in self.param_groups for p in group["params"]}
        return [p for p in params.values() if key in self.state.get(p, {})]


def _placed(weight: Tensor, p: Tensor) -> Tensor:
    """A weight distributed as its parameter is."""
    if not is_dtensor(p):
        return weight
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(p, DTensor)
    if isinstance(weight, DTensor):
        return weight.redistribute(p.device_mesh, p.placements)
    return distribute_tensor(weight.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
