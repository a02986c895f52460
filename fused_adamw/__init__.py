"""AdamW done right in one line: the right parameters decay, clipping happens inside one fused update."""

from .averages import EMA
from .backends import available_backends
from .groups import WidthScale, build_param_groups, explain_param_groups, get_optimizer_grouped_parameters
from .muon import MuonWithAdamW, split_for_muon
from .optimizer import AdamW, FusedHygieneAdamW
from .spikes import SpikeGuard
from .step.statistics import ParamStats
from .version import __version__

__all__ = [
    "EMA",
    "AdamW",
    "FusedHygieneAdamW",
    "MuonWithAdamW",
    "ParamStats",
    "SpikeGuard",
    "WidthScale",
    "__version__",
    "available_backends",
    "build_param_groups",
    "explain_param_groups",
    "get_optimizer_grouped_parameters",
    "split_for_muon",
]
