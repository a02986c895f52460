"""Following parameters through a forward pass, operator by operator.

Each tensor carries a label or none (`labels.py`). Where parameters and activations meet, the operator tells
how they are used (`meet.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .combine import combine
from .labels import Call, Data, Key, Operand, Trail, Uses, Weight, parts_of, tensors_in
from .meet import meet


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels what every operator returns, and notes how parameters are used.

    Args:
        parameters: The parameters as the forward pass knows them, by the identity to report them under.
        inputs: The tensors that the model is called with.
    """

    def __init__(self, parameters: Mapping[Key, Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses = Uses()
        self._labels: Any = WeakIdKeyDictionary()
        for key, tensor in parameters.items():
            for part in (tensor, *parts_of(tensor)):
                self._labels[part] = Weight({key: Trail(tuple(tensor.shape))})
        n_data = 0
        for tensor in inputs:
            is_data = tensor.is_floating_point() and tensor.dim() > 1  # a number per sample is a condition
            self._labels[tensor] = Data(source=n_data if is_data else None)
            n_data += is_data

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result

    def finish(self, output: Any) -> Uses:
        """Note the last maps before the model's first output, and return what was seen."""
        first = next(tensors_in(output), None)
        label = None if first is None else self._label_of(first)
        if isinstance(label, Data):
            self.uses.outputs |= label.makers
        return self.uses

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        name = name.rstrip("_") if not name.endswith("__") else name
        if name.endswith("_like") or name.startswith("new_"):
            return  # only the shape counts
        operands = list(self._operands(func, args, kwargs))
        call = Call(name, args, operands, list(tensors_in(result)))
        for _, weight in call.weights:
            self.uses.reached |= set(weight.trails)
        label: Weight | Data | None = None
        if call.data:
            label = meet(call, self.uses)
        elif call.weights:
            label = combine(call, self.uses)
        if label is None:
            return
        written = operands[0].tensor if operands and func._schema.is_mutable else None
        for tensor in call.results:
            self._labels[tensor] = label
        if written is not None:
            self._labels[written] = label
            if written._base is not None and not isinstance(self._labels.get(written._base), Data):
                self._labels[written._base] = label

    def _operands(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Operand]:
        named = zip((a.name for a in func._schema.arguments), args, strict=False)
        for name, value in (*named, *kwargs.items()):
            for tensor in tensors_in(value):
                yield Operand(name, tensor, self._label_of(tensor))

    def _label_of(self, tensor: Tensor) -> Weight | Data | None:
        """The label of a tensor, or of what a wrapper is made of."""
        labels = (self._labels.get(part) for part in (tensor, *parts_of(tensor)))
        return next((label for label in labels if label is not None), None)
