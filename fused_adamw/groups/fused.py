"""Matrices that hold several: where a fused projection is to be cut, and how a stack lies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from .places import Place, class_of, shape_of, words

_TRANSPOSED = frozenset({"Conv1D"})  # types that keep (in, out)
_QKV = frozenset({"qkv", "wqkv", "qkvw"})
_GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))
_INTERLEAVED = ("GptOss",)  # classes, by the start of their names, whose fused halves alternate
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def is_transposed(place: Place, shape: tuple[int, ...]) -> bool:
    """Whether a matrix, or each of a stack, is kept as (in, out).

    A stack of fused gates and ups tells by its sibling that maps back.

    Args:
        place: Where the tensor hangs.
        shape: Its shape.
    """
    if class_of(place.owner).__name__ in _TRANSPOSED:
        return True
    siblings = {key: shape_of(p) for key, p in place.owner._parameters.items() if p is not None}
    gate_up, down = siblings.get("gate_up_proj", ()), siblings.get("down_proj", ())
    if len(shape) == 3 and place.local in ("gate_up_proj", "down_proj") and len(gate_up) == len(down) == 3:
        return gate_up[-1] == 2 * down[-2] and gate_up[-2] == down[-1]
    return False


def splits(place: Place, fan_out: int, fan_in: int) -> tuple[int, ...]:
    """The sizes, along the outputs, of the matrices that a fused one holds one after the other.

    Args:
        place: Where the tensor hangs.
        fan_out: Its outputs.
        fan_in: Its inputs.

    Returns:
        The sizes; empty if it is one matrix, or if how it is cut is not known.
    """
    owner, attribute = place.owner, place.owner_name.rpartition(".")[2]
    gates = next((n for kind, n in _GATES if isinstance(owner, kind)), 1)
    if gates > 1:
        return (fan_out // gates,) * gates
    if any(class_of(module).__name__.startswith(_INTERLEAVED) for _, module in place.ancestors):
        return ()
    name = place.local if place.local not in ("weight", "w", "kernel") else attribute
    parts = words(name)
    is_attention = isinstance(owner, nn.MultiheadAttention) and place.local == "in_proj_weight"
    if is_attention or _QKV & set(parts) or name == "c_attn":
        return _qkv(place, fan_out, fan_in, may_lack_queries=name == "c_attn")
    if ("gate", "up") in pairwise(parts) or name == "w12":
        return (fan_out // 2,) * 2
    return ()


def _qkv(place: Place, fan_out: int, fan_in: int, may_lack_queries: bool) -> tuple[int, ...]:
    if fan_out == 3 * fan_in:
        return (fan_in,) * 3
    if may_lack_queries and fan_out == 2 * fan_in:
        return (fan_in,) * 2
    for _, module in place.ancestors[:-4:-1]:
        for held in (module, getattr(module, "config", None)):
            heads, kv = _number(held, _HEADS), _number(held, _KV_HEADS)
            size = _number(held, ("head_dim", "head_size")) or (fan_in // heads if heads else 0)
            if heads and size and (heads + 2 * (kv or heads)) * size == fan_out:
                return (heads * size, (kv or heads) * size, (kv or heads) * size)
    return ()


def _number(held: Any, names: tuple[str, ...]) -> int:
    values = (getattr(held, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
