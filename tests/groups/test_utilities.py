"""torch's own utilities that rename, split or replace parameters leave every role as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_adamw.groups import Role, explain_param_groups

from .models import Conv1D, RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore")  # the utilities' own deprecations


def raw(class_name, **tensors):
    module = type(class_name, (nn.Module,), {})()
    for name, shape in tensors.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def moe():
    return raw("Experts", gate_up_proj=(2, 4, 6), gate_up_proj_bias=(2, 6), router=(4, 2))


# One per rule of `TYPES`, and what structure and names find: module, the tensor that the utility works on.
HOSTS = {
    "Linear": (lambda: nn.Linear(4, 6), "weight"),
    "Linear of one row": (lambda: nn.Linear(4, 1), "weight"),
    "Bilinear": (lambda: nn.Bilinear(2, 3, 4), "weight"),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3), "weight"),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), "weight"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3), "weight"),
    "LSTM": (lambda: nn.LSTM(3, 4), "weight_hh_l0"),
    "GRUCell": (lambda: nn.GRUCell(3, 4), "weight_ih"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "Embedding": (lambda: nn.Embedding(8, 4), "weight"),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(8, 4), "weight"),
    "PReLU": (lambda: nn.PReLU(4), "weight"),
    "LayerNorm": (lambda: nn.LayerNorm(4), "weight"),
    "LayerNorm of images": (lambda: nn.LayerNorm([3, 4, 5]), "weight"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), "weight"),
    "RMSNorm": (lambda: nn.RMSNorm(4), "weight"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), "weight"),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), "weight"),
    "Conv1D": (lambda: Conv1D(6, 4), "weight"),
    "custom norm": (lambda: RMSNorm(4), "weight"),
    "custom activation": (lambda: raw("Snake1d", alpha=(1, 4, 1)), "alpha"),
    "custom embedding": (lambda: raw("TokenEmbedding", weight=(8, 4)), "weight"),
    "LayerScale": (lambda: raw("LayerScale", gamma=(4,)), "gamma"),
    "raw position": (lambda: raw("ViT", pos_embed=(1, 5, 4)), "pos_embed"),
    "raw recurrence": (lambda: raw("Mixer", A_log=(8, 4), D=(8,)), "A_log"),
    "raw matrix": (lambda: raw("Attention", W_query=(4, 6), b_query=(2, 6)), "W_query"),
    "raw matrix among siblings": (lambda: raw("Attention", query=(4, 6), key=(4, 6)), "key"),
    "raw bias": (moe, "gate_up_proj_bias"),
    "raw expert": (moe, "gate_up_proj"),
    "raw unknown": (lambda: raw("Thing", zeta=(4, 6)), "zeta"),
}


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class Split(nn.Module):
    """Makes a tensor from two of its shape."""

    def forward(self, a, b):
        return a + b

    def right_inverse(self, x):
        return x / 2, x / 2


UTILITIES = {
    "prune": lambda m, n: prune.random_unstructured(m, n, amount=0.3),
    "prune twice": lambda m, n: prune.l1_unstructured(prune.random_unstructured(m, n, amount=1), n, amount=1),
    "weight_norm": lambda m, n: parametrizations.weight_norm(m, n),
    "old weight_norm": lambda m, n: nn.utils.weight_norm(m, n),
    "old weight_norm, whole": lambda m, n: nn.utils.weight_norm(m, n, dim=None),
    "spectral_norm": lambda m, n: parametrizations.spectral_norm(m, n),
    "old spectral_norm": lambda m, n: nn.utils.spectral_norm(m, n),
    "parametrize": lambda m, n: parametrize.register_parametrization(m, n, Doubled()),
    "parametrize in parts": lambda m, n: parametrize.register_parametrization(m, n, Split()),
    "prune after weight_norm": lambda m, n: prune.identity(nn.utils.weight_norm(m, n), f"{n}_v"),
}


def roles(module):
    return {d.name: d.role for d in explain_param_groups(module).decisions}


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("host", HOSTS)
def test_roles_stay(host, utility):
    make, name = HOSTS[host]
    module = make()
    before = roles(module)
    shape = getattr(module, name).shape
    if len(shape) < 2 and "norm" in utility:
        pytest.skip("a norm of a vector's rows needs rows")
    UTILITIES[utility](module, name)
    after = roles(module)
    parts = {key: role for key, role in after.items() if key not in before}
    gains = {key for key, role in parts.items() if role is Role.WEIGHT_NORM_GAIN}
    assert {key: role for key, role in after.items() if key in before} == {
        key: role for key, role in before.items() if key != name
    }
    assert len(gains) == ("weight_norm" in utility)
    assert {parts[key] for key in parts if key not in gains} == {before[name]}


@pytest.mark.parametrize(
    "host", ["Linear", "Conv2d", "Embedding", "raw matrix", "raw position", "custom embedding"]
)
def test_only_matrices_become_orthogonal(host):
    make, name = HOSTS[host]
    module = make()
    before = roles(module)[name]
    parametrizations.orthogonal(module, name)
    after = roles(module)[f"parametrizations.{name}.original"]
    assert after is (Role.ORTHOGONAL if before in (Role.MATRIX, Role.CONVOLUTION) else before)


def test_quantization_aware_training():
    from torch.ao import quantization

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2), nn.Embedding(3, 4)
    )
    plain = roles(model)
    fused = quantization.fuse_modules_qat(model, [["0", "1", "2"]])
    fused.qconfig = quantization.get_default_qat_qconfig()
    fused[5].qconfig = quantization.float_qparams_weight_only_qconfig_4bit
    prepared = quantization.prepare_qat(fused)
    found = roles(prepared)
    assert found["0.weight"] is plain["0.weight"]
    assert found["0.bn.weight"] is plain["1.weight"]
    assert found["0.bn.bias"] is plain["1.bias"]
    assert {found[key] for key in ("4.weight", "4.bias", "5.weight")} == {
        plain[key] for key in ("4.weight", "4.bias", "5.weight")
    }
    assert len(found) == len(plain)


def test_a_gate_and_a_value_matrix_are_no_weight_norm():
    for shape in ((4, 6), (6,)):
        assert Role.WEIGHT_NORM_GAIN not in roles(raw("GLU", w_g=shape, w_v=(4, 6))).values()
    assert roles(raw("GLU", W_g=(4, 6), W_v=(4, 6))) == {"W_g": Role.MATRIX, "W_v": Role.MATRIX}


def test_a_name_of_ones_own_that_ends_like_a_utilitys():
    assert roles(raw("Thing", zeta_orig=(4, 6), zeta_v=(4, 6), zeta_g=(2, 3))) == dict.fromkeys(
        ("zeta_orig", "zeta_v", "zeta_g"), Role.UNKNOWN
    )
