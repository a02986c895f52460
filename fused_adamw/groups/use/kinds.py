"""Which operation means which kind of use: tables over ATen operators, data only.

Linear layers, `einsum` and attention arrive here as the matrix products that they are made of, since they are
watched below autograd.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ..roles import Role


class Meaning(NamedTuple):
    """What a kind of use means.

    Attributes:
        role: The role of a tensor used so.
        words: The use in words, a clause about the tensor.
        short: The use in a word or two.
    """

    role: Role
    words: str
    short: str


class Kind(Enum):
    """How a forward pass uses a parameter."""

    MAP = Meaning(Role.MATRIX, "activations are multiplied by it: a map", "multiplied")
    FEATURE_MAP = Meaning(
        Role.MATRIX, "each feature is multiplied by a vector of it: a map per feature", "multiplied"
    )
    CONVOLUTION = Meaning(Role.CONVOLUTION, "activations are convolved with it: a map", "convolved")
    TABLE = Meaning(Role.EMBEDDING, "the input picks its rows: a table", "rows picked")
    POSITION = Meaning(
        Role.POSITION, "it is added to every token's activation: a position", "added to tokens"
    )
    BIAS = Meaning(Role.BIAS, "it is added to the result of a map: a bias", "added to a map's result")
    SHIFT = Meaning(Role.BIAS, "it is added to activations: a shift", "added")
    TOKEN = Meaning(Role.TOKEN, "it is put beside or in place of activations: a token", "put among tokens")
    QUERY = Meaning(Role.QUERY, "it is fed to layers as activations are: learned rows", "used as rows")
    GAIN = Meaning(Role.GAIN, "activations are scaled by it: a gain", "scales")
    TEMPERATURE = Meaning(Role.TEMPERATURE, "all activations are scaled by it: a temperature", "scales all")
    FREQUENCY = Meaning(Role.FREQUENCY, "its sine or cosine is taken: frequencies", "sine or cosine")
    RECURRENCE = Meaning(
        Role.RECURRENCE, "it scales activations through exp, softplus or sigmoid: dynamics", "dynamics"
    )
    SPREAD = Meaning(Role.SPREAD, "it scales noise that is added to a mean of its shape: a spread", "spread")

    @property
    def is_map(self) -> bool:
        return self in (Kind.MAP, Kind.FEATURE_MAP, Kind.CONVOLUTION)


# Operator -> its two factors.
PRODUCTS: dict[str, tuple[str, str]] = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "linear": ("input", "weight"),
    "matmul": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "addbmm": ("batch1", "batch2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
    "_scaled_mm": ("self", "mat2"),
    "_grouped_mm": ("self", "mat2"),
    "_scaled_grouped_mm": ("self", "mat2"),
    "_int_mm": ("self", "mat2"),
    "_weight_int8pack_mm": ("self", "mat2"),
    "_weight_int4pack_mm": ("self", "mat2"),
    "convolution": ("input", "weight"),
    "_convolution": ("input", "weight"),
    "mkldnn_convolution": ("self", "weight"),
    "cudnn_convolution": ("self", "weight"),
}
CONVOLUTIONS = frozenset({"convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"})

_AFFINE = {"weight": Kind.GAIN, "bias": Kind.SHIFT}
_ATTENTION = {
    "query": Kind.QUERY,
    "key": Kind.TOKEN,
    "value": Kind.TOKEN,
    "attn_mask": Kind.POSITION,
    "attn_bias": Kind.POSITION,
}
_BIASED = {"bias": Kind.BIAS}

# Operator -> argument -> how a parameter is used that arrives there.
ARGUMENTS: dict[str, dict[str, Kind]] = {
    "addmm": {"self": Kind.BIAS},
    "_addmm_activation": {"self": Kind.BIAS},
    "addbmm": {"self": Kind.BIAS},
    "baddbmm": {"self": Kind.BIAS},
    "addmv": {"self": Kind.BIAS},
    "linear": _BIASED,
    "_scaled_mm": _BIASED,
    "_grouped_mm": _BIASED,
    "convolution": _BIASED,
    "_convolution": _BIASED,
    "mkldnn_convolution": _BIASED,
    "cudnn_convolution": _BIASED,
    "native_layer_norm": _AFFINE,
    "native_group_norm": _AFFINE,
    "native_batch_norm": _AFFINE,
    "_native_batch_norm_legit": _AFFINE,
    "_native_batch_norm_legit_no_training": _AFFINE,
    "_batch_norm_with_update": _AFFINE,
    "_batch_norm_no_update": _AFFINE,
    "cudnn_batch_norm": _AFFINE,
    "_fused_rms_norm": _AFFINE,
    "mkldnn_rnn_layer": {
        "weight0": Kind.MAP,
        "weight1": Kind.MAP,
        "weight2": Kind.BIAS,
        "weight3": Kind.BIAS,
        "hx_": Kind.QUERY,
        "cx_": Kind.QUERY,
    },
    "prelu": {"weight": Kind.GAIN},
    "_prelu_kernel": {"weight": Kind.GAIN},
    "embedding": {"weight": Kind.TABLE},
    "_embedding_bag": {"weight": Kind.TABLE},
    "_embedding_bag_forward_only": {"weight": Kind.TABLE},
    "index": {"self": Kind.TABLE},
    "index_select": {"self": Kind.TABLE},
    "gather": {"self": Kind.TABLE},
    "take": {"self": Kind.TABLE},
    "cat": {"tensors": Kind.TOKEN},
    "stack": {"tensors": Kind.TOKEN},
    "where": {"self": Kind.TOKEN, "other": Kind.TOKEN},
    "masked_fill": {"value": Kind.TOKEN},
    "masked_scatter": {"source": Kind.TOKEN},
    "index_put": {"values": Kind.TOKEN},
    "copy": {"src": Kind.TOKEN},
    "scatter": {"src": Kind.TOKEN},
    "slice_scatter": {"src": Kind.TOKEN},
    "select_scatter": {"src": Kind.TOKEN},
    "_scaled_dot_product_attention_math": _ATTENTION,
    "_scaled_dot_product_flash_attention": _ATTENTION,
    "_scaled_dot_product_flash_attention_for_cpu": _ATTENTION,
    "_scaled_dot_product_efficient_attention": _ATTENTION,
    "_scaled_dot_product_cudnn_attention": _ATTENTION,
    "_scaled_dot_product_fused_attention_overrideable": _ATTENTION,
}

SCALING = frozenset({"mul", "div", "pow"})
SHIFTING = frozenset({"add", "sub", "rsub"})

# What happens to a tensor of parameters alone, and is remembered until activations meet it.
STEPS: dict[str, str] = {
    "exp": "squashed",
    "softplus": "squashed",
    "log_sigmoid_forward": "squashed",
    "sigmoid": "squashed",
    "cumsum": "squashed",
    "logcumsumexp": "squashed",
    "sin": "periodic",
    "cos": "periodic",
    "expand": "repeated",
    "repeat": "repeated",
    "embedding": "picked",
    "index": "picked",
    "index_select": "picked",
    "gather": "picked",
}

# Operators that leave activations what they are: views, casts, copies.
PASSING = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze"}
    | {"squeeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach"}
    | {
        "clone",
        "contiguous",
        "_to_copy",
        "to",
        "lift_fresh",
        "native_dropout",
        "as_strided",
        "unfold",
        "narrow",
    }
)
SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "_log_softmax", "log_softmax"})
NONLINEAR = frozenset({"sigmoid", "tanh", "relu", "gelu", "silu", "elu", "leaky_relu", "softplus"})
NONLINEAR |= frozenset({"hardswish", "hardsigmoid", "hardtanh", "mish", "clamp", "clamp_min"})
# Operators over one tensor after which a result still is that of its last map.
ACTIVATIONS = PASSING | SOFTMAX | frozenset({"sigmoid", "tanh", "relu", "neg"})
# Operators after which scores still are scores.
PADDING = frozenset({"constant_pad_nd", "pad", "roll", "flip", "neg", "masked_fill"})
EXPONENTIALS = frozenset({"exp", "softplus", "sigmoid"})
PERIODIC = frozenset({"sin", "cos"})
SUMS = frozenset({"sum", "mean"})
# Operators after which the index of the largest still says which one it is, and those by which it picks.
CHOICES = frozenset(
    {"eq", "ne", "scatter", "nonzero", "nonzero_numpy", "_to_copy", "bitwise_not", "logical_not"}
)
PICKING = frozenset(
    {"index", "index_select", "index_put", "index_add", "where", "masked_fill", "masked_select"}
)
