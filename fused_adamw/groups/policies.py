"""Which roles decay: our policy, the BERT/GPT recipe, and exact copies of what other tools do.

`HYGIENE` and `RECIPE` are tables over roles. The others are the rules of the named tool, written from its
source, so that a published recipe can be matched; they ignore roles, marks and hooks because the tool does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase

from torch import nn

from .places import Located
from .roles import Role

Verdict = tuple[bool, str]  # (does it decay, why)
Rule = Callable[[Located, Collection[str]], Verdict]  # the tensor, what the model's no_weight_decay() lists


@dataclass(frozen=True)
class Policy:
    """A named way to decide which parameters decay. It has a table of roles or a rule, never both.

    Attributes:
        name: The name users pass as `policy=`.
        source: Where the convention comes from.
        decays: Role -> (does it decay, why).
        rule: A function of the tensor and of the names that the model's own `no_weight_decay()` lists.
        marks: Whether marks on tensors and hooks of modules are honoured.
        exempt_first: Whether the groups without decay come first, as in the checkpoints of that tool.
    """

    name: str
    source: str
    decays: Mapping[Role, Verdict] | None = None
    rule: Rule | None = None
    marks: bool = False
    exempt_first: bool = False


# role: (decays, reason). Knobs: `roles={"embedding": True}` changes a line for one call.
HYGIENE_ROLES: dict[Role, Verdict] = {
    Role.MATRIX: (True, "matrices decay"),
    Role.CONVOLUTION: (True, "convolution kernels decay"),
    Role.INPUT: (True, "the first map is a map"),
    Role.OUTPUT: (True, "a head that is not tied is a map"),
    Role.ROUTER: (True, "a router is a map"),
    Role.BIAS: (False, "a bias shifts, it does not scale"),
    Role.NORM: (False, "decay would pull a norm's gain to zero, not to one"),
    Role.ZERO_CENTERED_NORM: (False, "norms do not decay, zero-centred ones neither"),
    Role.EMBEDDING: (False, "rows of rare tokens would shrink without ever getting a gradient"),
    Role.TIED_EMBEDDING: (False, "a tied head follows its embedding"),
    Role.POSITION: (False, "learned positions do not decay"),
    Role.POSITION_NETWORK: (True, "a network that makes positions is made of matrices"),
    Role.TOKEN: (False, "a learned token is an embedding of one row"),
    Role.QUERY: (False, "learned queries are embeddings"),
    Role.GAIN: (False, "a gain or gate scales a branch, as a norm's gain does"),
    Role.TEMPERATURE: (False, "a temperature has no reason to be near zero"),
    Role.RECURRENCE: (False, "it parameterises the dynamics of a recurrence; its authors exempt it"),
    Role.SSM_CONVOLUTION: (True, "convolution kernels decay"),
    Role.ACTIVATION: (False, "a learnable slope should not be pulled to zero"),
    Role.SINK: (False, "an attention sink is a logit bias"),
    Role.SPREAD: (False, "in log or softplus space, zero is not small"),
    Role.FREQUENCY: (False, "a frequency has no reason to be near zero"),
    Role.WEIGHT_NORM_GAIN: (False, "a weight-norm gain is a gain"),
    Role.ORTHOGONAL: (True, "it is a matrix, although its scale has no effect"),
    Role.ADAPTER_MATRIX: (True, "low-rank factors are matrices"),
    Role.ADAPTER_GAIN: (False, "an adapter's magnitude is a gain"),
    Role.VECTOR: (False, "vectors are gains or biases, not maps"),
    Role.UNKNOWN: (True, "what is not recognised decays"),
}

# "Only biases and norms are exempt": the recipe of BERT and GPT fine-tuning scripts.
_EXEMPT = {
    Role.BIAS: "biases are exempt",
    Role.NORM: "norms are exempt",
    Role.ZERO_CENTERED_NORM: "norms are exempt",
}
RECIPE_ROLES: dict[Role, Verdict] = {
    role: (role not in _EXEMPT, _EXEMPT.get(role, "all but biases and norms decays")) for role in Role
}


def _all(located: Located, listed: Collection[str]) -> Verdict:
    return True, "everything decays"


# Trainer.get_decay_parameter_names: searched in the lower-cased full name.
_HF_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def _huggingface(located: Located, listed: Collection[str]) -> Verdict:
    place = located.places[0]
    for pattern in _HF_PATTERNS:
        if re.search(pattern, place.name.lower()):
            return False, f"its name matches {pattern!r}"
    # get_parameter_names tests children, so a model that is a LayerNorm itself goes untested.
    if any(isinstance(module, nn.LayerNorm) for _, module in place.ancestors[1:]):
        return False, "it is inside an nn.LayerNorm"
    return True, "no pattern matches"


def _timm(located: Located, listed: Collection[str]) -> Verdict:
    if len(located.shape) <= 1:
        return False, f"it has {len(located.shape)} dimensions"
    if located.name.endswith(".bias"):
        return False, "its name ends with .bias"
    for entry in listed:
        if fnmatch(located.name, entry):
            return False, f"the model's no_weight_decay() lists {entry!r}"
    return True, "it has two dimensions or more, and no_weight_decay() does not list it"


def _nanogpt(located: Located, listed: Collection[str]) -> Verdict:
    dims = len(located.shape)
    return dims >= 2, f"it has {dims} dimensions"


def _megatron(located: Located, listed: Collection[str]) -> Verdict:
    if fnmatchcase(located.name, "*.bias"):
        return False, "its name ends with .bias"
    if len(located.shape) == 1:
        return False, "it has one dimension"
    return True, "it is not a .bias and does not have one dimension"


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("hygiene", "this project; reasons in docs/groups.md", decays=HYGIENE_ROLES, marks=True),
        Policy("recipe", "BERT and GPT fine-tuning scripts", decays=RECIPE_ROLES),
        Policy("huggingface", "transformers Trainer.get_decay_parameter_names", rule=_huggingface),
        Policy("timm", "timm.optim.param_groups_weight_decay", rule=_timm, exempt_first=True),
        Policy("nanogpt", "nanoGPT GPT.configure_optimizers", rule=_nanogpt),
        Policy("megatron", "Megatron-LM get_standard_config_overrides", rule=_megatron),
        Policy("all", "torch.optim.AdamW(model.parameters())", rule=_all),
    )
}


def get_policy(policy: str | Policy) -> Policy:
    """Return the policy called `policy`.

    Raises:
        ValueError: If there is no such policy.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; expected one of: {', '.join(POLICIES)}")
    return POLICIES[policy]
