"""Parameter groups for any optimizer: which parameters decay, and why."""

from .build import (
    build_param_groups,
    decided_groups,
    get_optimizer_grouped_parameters,
    new_param_groups,
    summarize_param_groups,
)
from .changes import DecayChange, decay_changes
from .decide import Decision, Options, decide
from .lint import Lint
from .muon import MuonHint, MuonSplit
from .overrides import Overrides, ParamGroupWarning
from .places import canonical
from .policies import POLICIES, Policy
from .report import ParamGroupReport, PolicyDiff, explain_param_groups
from .resume import compare_param_names
from .roles import Role, register_type
from .scaling import WidthScale
from .walk import is_model

__all__ = [
    "POLICIES",
    "DecayChange",
    "Decision",
    "Lint",
    "MuonHint",
    "MuonSplit",
    "Options",
    "Overrides",
    "ParamGroupReport",
    "ParamGroupWarning",
    "Policy",
    "PolicyDiff",
    "Role",
    "WidthScale",
    "build_param_groups",
    "canonical",
    "compare_param_names",
    "decay_changes",
    "decide",
    "decided_groups",
    "explain_param_groups",
    "get_optimizer_grouped_parameters",
    "is_model",
    "new_param_groups",
    "register_type",
    "summarize_param_groups",
]
