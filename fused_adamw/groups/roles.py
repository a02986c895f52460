"""What a parameter is for: the roles, and the tables that map module types and local names to them.

Tables, data only, from strong evidence to weak:

* `TYPES`: module type -> role of each of its own tensors. Subclasses are included.
* `ADAPTERS`: names of adapter containers (PEFT) -> role.
* `EXACT`, `NAMES`: local name of a raw parameter -> role. The name inside the owner, never the path.

A type is a class, or the name of a class of a library that is not imported here. `register_type` adds one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


class Role(str, Enum):
    """What a tensor does in its model. The value is the name used in `roles=` and in reports."""

    MATRIX = "matrix"
    CONVOLUTION = "convolution"
    INPUT = "input"
    OUTPUT = "output"
    ROUTER = "router"
    BIAS = "bias"
    NORM = "norm"
    ZERO_CENTERED_NORM = "zero_centered_norm"
    EMBEDDING = "embedding"
    TIED_EMBEDDING = "tied_embedding"
    POSITION = "position"
    POSITION_NETWORK = "position_network"
    TOKEN = "token"
    QUERY = "query"
    GAIN = "gain"
    TEMPERATURE = "temperature"
    RECURRENCE = "recurrence"
    SSM_CONVOLUTION = "ssm_convolution"
    ACTIVATION = "activation"
    SINK = "sink"
    SPREAD = "spread"
    FREQUENCY = "frequency"
    WEIGHT_NORM_GAIN = "weight_norm_gain"
    ORTHOGONAL = "orthogonal"
    ADAPTER_MATRIX = "adapter_matrix"
    ADAPTER_GAIN = "adapter_gain"
    VECTOR = "vector"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


# What activations are multiplied by.
MAPS = frozenset(
    {Role.MATRIX, Role.CONVOLUTION, Role.INPUT, Role.OUTPUT, Role.ROUTER, Role.SSM_CONVOLUTION}
    | {Role.POSITION_NETWORK, Role.ADAPTER_MATRIX, Role.ORTHOGONAL}
)

# What is made of rows.
TABLES = frozenset({Role.EMBEDDING, Role.POSITION, Role.QUERY, Role.TOKEN})

# One line per kind of module: {glob over the local name: role}; a tensor that no glob matches is decided
# by its name and shape, as in a class we do not know.
_NORM = {"bias": Role.BIAS, "weight": Role.NORM}
_ZERO_CENTERED = {"bias": Role.BIAS, "weight": Role.ZERO_CENTERED_NORM}
_LINEAR = {"weight": Role.MATRIX, "bias": Role.BIAS}
_CONV = {"weight": Role.CONVOLUTION, "bias": Role.BIAS}
_RECURRENT = {"weight_*": Role.MATRIX, "bias_*": Role.BIAS}

TYPES: dict[type | str, Mapping[str, Role]] = {
    # torch
    nn.Linear: _LINEAR,
    nn.Bilinear: _LINEAR,
    _ConvNd: _CONV,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.MultiheadAttention: {
        "in_proj_weight": Role.MATRIX,
        "[qkv]_proj_weight": Role.MATRIX,
        "in_proj_bias": Role.BIAS,
        "bias_[kv]": Role.BIAS,
    },
    nn.Embedding: {"weight": Role.EMBEDDING},
    nn.EmbeddingBag: {"weight": Role.EMBEDDING},
    nn.PReLU: {"weight": Role.ACTIVATION},
    nn.LayerNorm: _NORM,
    nn.GroupNorm: _NORM,
    nn.RMSNorm: _NORM,
    _NormBase: _NORM,  # BatchNorm, SyncBatchNorm, InstanceNorm
    # by class name: libraries that are not imported
    "Conv1D": _LINEAR,  # transformers: GPT-2's transposed linear layer
    "ColumnParallelLinear": _LINEAR,  # Megatron-LM, fairscale
    "RowParallelLinear": _LINEAR,
    "VocabParallelEmbedding": {"weight": Role.EMBEDDING},
    "FusedLayerNorm": _NORM,  # apex
    "FusedRMSNorm": _NORM,
    "LayerScale": {"*": Role.GAIN},
    "LayerScale2d": {"*": Role.GAIN},
    # norms that compute x * (1 + w), so that w = 0 is the identity
    "GemmaRMSNorm": _ZERO_CENTERED,
    "Gemma2RMSNorm": _ZERO_CENTERED,
    "Gemma3RMSNorm": _ZERO_CENTERED,
    "RecurrentGemmaRMSNorm": _ZERO_CENTERED,
    "T5GemmaRMSNorm": _ZERO_CENTERED,
    "T5Gemma2RMSNorm": _ZERO_CENTERED,
    "VaultGemmaRMSNorm": _ZERO_CENTERED,
    "Qwen3NextRMSNorm": _ZERO_CENTERED,
    "Qwen3_5RMSNorm": _ZERO_CENTERED,
    "Qwen3_5MoeRMSNorm": _ZERO_CENTERED,
    "Qwen4ExpTextRMSNorm": _ZERO_CENTERED,
    "MiniMaxM3VLRMSNorm": _ZERO_CENTERED,
    "MuseGlimmerTextCenteredRMSNorm": _ZERO_CENTERED,
    "MuseSparkTextCenteredRMSNorm": _ZERO_CENTERED,
    "MuseSparkTextInputScaledRMSNorm": _ZERO_CENTERED,
    "NemotronLayerNorm1P": _ZERO_CENTERED,
    "QwenImage21ZeroCenterRMSNorm": _ZERO_CENTERED,  # diffusers
    "Step3p7RMSNorm": _ZERO_CENTERED,
}

# PEFT and LyCORIS keep an adapter's tensors under these names, below the layer that they adapt. PEFT's other
# adapters are found by the `adapter_layer_names` of their layer.
ADAPTERS: dict[str, Role] = {
    "lora_A": Role.ADAPTER_MATRIX,
    "lora_B": Role.ADAPTER_MATRIX,
    "lora_down": Role.ADAPTER_MATRIX,
    "lora_mid": Role.ADAPTER_MATRIX,
    "lora_up": Role.ADAPTER_MATRIX,
    "lora_embedding_A": Role.ADAPTER_MATRIX,
    "lora_embedding_B": Role.ADAPTER_MATRIX,
    "lora_E": Role.ADAPTER_GAIN,  # AdaLoRA: the singular values
    "lora_magnitude_vector": Role.ADAPTER_GAIN,  # DoRA
    "boft_s": Role.ADAPTER_GAIN,
    "ia3_l": Role.ADAPTER_GAIN,
    "vera_lambda_b": Role.ADAPTER_GAIN,
    "vera_lambda_d": Role.ADAPTER_GAIN,
}


# Names that mean one thing when they are written exactly so. TransformerLens: every other W_* is a matrix and
# b_* its bias, as in any other library.
EXACT: dict[str, Role] = {"W_E": Role.EMBEDDING, "W_pos": Role.POSITION, "W_token_type": Role.EMBEDDING}


class NameRule(NamedTuple):
    """A rule for the local name of a raw parameter.

    Attributes:
        role: What such a name means.
        pattern: Matched against the whole name, lower case, words joined by `_`, numbers dropped.
        vector_only: Only for tensors with at most one dimension larger than one.
        map_only: Only for tensors that may be a matrix: two dimensions, or two larger than one.
        beside: `(word, others)`: only if the owner holds a tensor of the same name with one of the others in
            that word's place.
        biased: Only if the owner holds a `<name>_bias`, as long as one of the tensor's ends.
        confidence: How much such a name says.
    """

    role: Role
    pattern: re.Pattern[str]
    vector_only: bool = False
    map_only: bool = False
    beside: tuple[str, tuple[str, ...]] | None = None
    biased: bool = False
    confidence: Literal["medium", "low"] = "medium"


def _name(role: Role, pattern: str, **conditions: Any) -> NameRule:
    return NameRule(role, re.compile(pattern), **conditions)


_EMBED = "(emb|embs|embed|embeds|embedding|embeddings|encoding|encodings|enc)"
_POS = "(pos|position|positions|positional|rel|relative|rpe|ape)"
_PLAIN = (
    "bias|b|scales?|gain|gamma|beta|norm|mask|zero|log|sigma|rho"  # not matrices, after w or weight either
)

_NO_ROWS = r"(.*_)?(w|weights?|proj|projection|net|network|mlp|conv|kernel|matrix|key|query)(_|$)"

# The first rule that matches decides, so the order matters: `relative_position_bias_table` is a
# position although it says bias, `layer_norm_weight` a norm although it says weight.
NAMES: tuple[NameRule, ...] = (
    # what has a bias of its own is a map
    _name(Role.MATRIX, r".*", map_only=True, biased=True),
    # what the name of a sibling settles: the bias of W_q is b_q, that of gamma is beta; a query beside a key
    # is the matrix of an attention, an encoder beside a decoder that of an autoencoder
    _name(Role.BIAS, r"(.*_)?b(_.*)?", beside=("b", ("w", "weight"))),
    _name(Role.BIAS, r"(.*_)?beta(_.*)?", beside=("beta", ("gamma",))),
    _name(Role.BIAS, r"(.*_)?shift(_.*)?", beside=("shift", ("scale",))),
    _name(Role.SPREAD, r"(.*_)?rho(_.*)?", beside=("rho", ("mu", "mean", "loc"))),
    _name(Role.SPREAD, r"(.*_)?logvar(_.*)?", beside=("logvar", ("mu", "mean", "loc"))),
    _name(Role.SPREAD, r"(.*_)?log_(sigma|std|var)(_.*)?|.*_log_(sigma|std|var)"),
    _name(Role.MATRIX, r"(.*_)?query", map_only=True, beside=("query", ("key",))),
    _name(Role.MATRIX, r"(.*_)?key", map_only=True, beside=("key", ("query",))),
    _name(Role.MATRIX, r"(.*_)?value", map_only=True, beside=("value", ("query", "key"))),
    _name(Role.MATRIX, r"(.*_)?enc", map_only=True, beside=("enc", ("dec",))),
    _name(Role.MATRIX, r"(.*_)?dec", map_only=True, beside=("dec", ("enc",))),
    # a leading w or weight, or a map as the last word, makes a matrix, whatever it maps
    _name(Role.MATRIX, rf"w(eights?)?_(.*_)?({_EMBED}|{_POS}|tokens?)", map_only=True, confidence="low"),
    _name(Role.MATRIX, rf"w(eights?)?_(?!(.*_)?({_PLAIN})(_|$)).*", map_only=True),
    _name(Role.MATRIX, r"(.*_)?(proj|projection|kernel|matrix)(_(w|weight))?", map_only=True),
    # state-space and linear-recurrence dynamics: Mamba, VMamba, S4, LRU, RG-LRU, RWKV
    _name(Role.RECURRENCE, r"(.*_)?a_logs?|ds|log_a(_.*)?|a_(real|imag)|(inv|log)_dt|dt_bias"),
    _name(Role.RECURRENCE, r"d", beside=("d", ("a_log",))),
    _name(Role.RECURRENCE, r"d|recurrent_param|(nu|theta|gamma)_log", vector_only=True),
    _name(Role.RECURRENCE, r"time_(decay|first|faaaa)"),
    _name(Role.RECURRENCE, r"(lower|upper)_bounds?|(log_)?decays?|bonus|r_k"),  # HGRN, RWKV-6 and 7
    _name(Role.FREQUENCY, r"((low|high|min|max|band|center|centre)_)+(hz|freqs?|frequenc(y|ies))"),
    _name(Role.RECURRENCE, r"time_(mix|maa|shift)(_[a-z]+)?", vector_only=True),
    # positions, absolute and relative; but a query's position is a query
    _name(Role.QUERY, r"(.*_)?query_(tokens?|embed.*|pos.*)"),
    _name(Role.POSITION, rf"(.*_)?{_POS}_({_EMBED}|bias|table|tokens?|params?|const|[hwtxyd])(_.*)?"),
    _name(Role.POSITION, rf"(.*_)?(row|col|column|height|width|time|temporal|spatial)_(rel|{_EMBED})(_.*)?"),
    _name(Role.POSITION, rf"({_EMBED}|rel)_{_POS}(_.*)?"),
    _name(Role.POSITION, r"(.*_)?relative_(.*_)?(bias|table|embeddings?)(_.*)?|(.*_)?bias_table"),
    _name(
        Role.POSITION,
        rf"(.*_)?({_POS}|freqs|pos_frequencies|wpe(_weight)?)|att(entio)?n_biases|(.*_)?rope(_.*)?",
    ),
    # norms and biases inside a larger module
    _name(Role.NORM, r"(.*_)?([a-z]*norm|ln|bn|gn)(_(weight|scale|gamma|gain|g|w))?", vector_only=True),
    _name(Role.BIAS, r"(.*_)?bias(es)?(_(?!.*(weight|proj|kernel)).*)?"),
    _name(Role.BIAS, r"b|beta|(.*_)?(shift|offset|translate)", vector_only=True),
    # scalars with a meaning
    _name(Role.SINK, r"(.*_)?sinks?"),
    _name(
        Role.TEMPERATURE, r"(.*_)?(temperature|temp|tau|inv_temp|logits?_scale(_[a-z])?)", vector_only=True
    ),
    # learned rows: queries, special tokens, tables
    _name(Role.QUERY, r"(.*_)?(queries|latents?|object_query)(_.*)?"),
    _name(Role.QUERY, r"(.*_)?query"),
    _name(
        Role.TOKEN,
        r"(?!(word_)?(emb|embed|embedding)_)(.*_)?(tokens?|probe|registers?|newline|separator|prompts?)",
    ),
    _name(
        Role.TOKEN, rf"(cls|class|masked|mask|sep|eos|sos|bos|pad)_(.*_)?{_EMBED}|(no|not|null|missing)_.*"
    ),
    _name(Role.TOKEN, r"(.*_)?tokens?_.*|image_(begin|end|sep)", vector_only=True),
    _name(Role.TOKEN, r"(mem|memory|null)_(k|v|kv)"),
    _name(Role.TOKEN, rf"(?!{_NO_ROWS})(.*_)?(mems?|memory|memories)(_.*)?"),
    _name(Role.QUERY, rf"(?!{_NO_ROWS})(.*_)?(seeds?|inducing)(_.*)?"),
    _name(Role.EMBEDDING, r"(ents?|entity|entities|relations?)", map_only=True),
    _name(Role.EMBEDDING, rf"(.*_)?({_EMBED}|table|codebook|codevectors)|modulation|embed_.*|wte(_weight)?"),
    _name(Role.EMBEDDING, r"(.*_)?embeddings_(?!.*(weight|proj|kernel)).*"),
    _name(Role.ADAPTER_MATRIX, r"lora_[ab]|(lora|hada|lokr)_(.*_)?([abtw]|down|mid|up)", map_only=True),
    # gains: layer scale, residual gates, ReZero, NFNet
    _name(Role.GAIN, r"(.*_)?(layer_?scale|gamma|lambdas?|alphas?|scale|gain)"),
    _name(Role.GAIN, r"(.*_)?(layer_?scale|gamma|lambda|alpha|scale|gain)_.*", vector_only=True),
    _name(
        Role.GAIN, r"(.*_)?(scales|scaling|gate|gating|skip|mult|multiplier|residual)(_.*)?", vector_only=True
    ),
    _name(Role.GAIN, r"rezero|resweight|ls|(.*_)?strength", vector_only=True),
    # a position word anywhere else
    _name(Role.POSITION, rf"(?!{_NO_ROWS})(.*_)?(pos|positions?|positional)_.*"),
    # matrices held directly
    _name(Role.MATRIX, r"(.*_)?(weights?|w|kernels?|matrix|proj|projection|experts?)(_.*)?", map_only=True),
    _name(Role.MATRIX, r"[qkvor]|root", map_only=True),
    _name(Role.MATRIX, r"att(_.*)?"),  # graph attention: a vector per head, multiplied like a matrix
)


def register_type(kind: type | str, roles: Mapping[str, Role | str]) -> None:
    """Teach the builder a module type.

    Args:
        kind: The class, or the name of a class (bare or with its module), subclasses included.
        roles: Glob over the names of the module's own tensors -> role. A tensor that no glob matches
            is decided by its name and shape.

    Raises:
        TypeError: If `kind` is neither a class nor a string.
        ValueError: If a role is unknown.

    Examples:
        >>> register_type("MyFusedNormLinear", {"norm_*": Role.NORM, "weight": Role.MATRIX})
    """
    if not isinstance(kind, (type, str)):
        raise TypeError(f"expected a class or the name of a class, got {kind!r}")
    TYPES[kind] = {glob: as_role(role) for glob, role in roles.items()}


def as_role(value: Role | str) -> Role:
    """Return the role called `value`; a ValueError lists the roles there are."""
    try:
        return Role(value)
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise ValueError(f"unknown role {value!r}; expected one of: {known}") from None


def roles_of_type(cls: type) -> tuple[str, Mapping[str, Role]] | None:
    """Find the most derived class of `cls` that the registry knows.

    Returns:
        The name of that class and the roles of its tensors, or None.
    """
    for base in cls.__mro__:
        for key in (base, f"{base.__module__}.{base.__qualname__}", base.__name__):
            if key in TYPES:
                return base.__name__, TYPES[key]
    return None
