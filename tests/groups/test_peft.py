"""PEFT's own wrappers around a tiny GPT-2; answers from the papers of the adapters."""

import pytest
import torch
from torch import nn

from fused_adamw.groups import Role, build_param_groups, explain_param_groups, new_param_groups

from .helpers import assert_partition, decays

pytestmark = pytest.mark.slow

PREFIX = "base_model.model."
C_ATTN = PREFIX + "transformer.h.0.attn.c_attn."


@pytest.fixture
def gpt2(transformers):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def check(model, expected):
    groups = build_param_groups(model, 0.1)
    assert decays(groups) == expected
    assert_partition(model, groups)


def test_lora(peft, gpt2):
    model = peft.get_peft_model(gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    expected = {C_ATTN + "lora_A.default.weight": True, C_ATTN + "lora_B.default.weight": True}
    check(model, expected)
    assert explain_param_groups(model).decision(C_ATTN + "lora_A.default.weight").role is Role.ADAPTER_MATRIX
    # The LoRA+ optimizer of PEFT leaves the factors undecayed.
    knob = build_param_groups(model, 0.1, roles={"adapter_matrix": False})
    assert not any(decays(knob).values())


def test_lora_with_bias_embedding_and_modules_to_save(peft, gpt2):
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "wpe"], modules_to_save=["ln_f"], bias="lora_only", fan_in_fan_out=True
    )
    check(
        peft.get_peft_model(gpt2, config),
        {
            C_ATTN + "lora_A.default.weight": True,
            C_ATTN + "lora_B.default.weight": True,
            C_ATTN + "base_layer.bias": False,
            PREFIX + "transformer.wpe.lora_embedding_A.default": True,
            PREFIX + "transformer.wpe.lora_embedding_B.default": True,
            PREFIX + "transformer.ln_f.modules_to_save.default.weight": False,
            PREFIX + "transformer.ln_f.modules_to_save.default.bias": False,
        },
    )


def test_dora(peft, gpt2):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    check(
        peft.get_peft_model(gpt2, config),
        {
            C_ATTN + "lora_A.default.weight": True,
            C_ATTN + "lora_B.default.weight": True,
            C_ATTN + "lora_magnitude_vector.default.weight": False,
        },
    )


def test_ia3(peft, gpt2):
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    check(peft.get_peft_model(gpt2, config), {C_ATTN + "ia3_l.default": False})


def test_prompt_tuning(peft, gpt2):
    model = peft.get_peft_model(gpt2, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    check(model, {"prompt_encoder.default.embedding.weight": False})


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(self.lin(x))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("LoHa", {"r": 2}),
        ("LoKr", {"r": 2}),
        ("Hira", {"r": 2}),
        ("Gralora", {"r": 4}),
        ("Poly", {"r": 2}),
        ("Delora", {"r": 2}),
        ("Adamss", {"r": 2}),
        ("Miss", {"r": 2}),
        ("HRA", {"r": 2}),
        ("Deft", {}),
        ("VBLoRA", {"r": 2, "vector_length": 4, "num_vectors": 4}),
    ],
)
def test_what_a_layer_lists_as_adapters(peft, method, options):
    config = getattr(peft, f"{method}Config")(target_modules=["lin"], **options)
    model = peft.get_peft_model(Encoder(), config)
    report = explain_param_groups(model)
    roles = {d.role for d in report.decisions}
    assert Role.ADAPTER_MATRIX in roles
    assert roles <= {Role.ADAPTER_MATRIX, Role.ADAPTER_GAIN}
    assert not report.lints
    assert not any(decays(build_param_groups(model, 0.1, roles={"adapter_matrix": False})).values())


def test_unfreezing_the_base_model(peft, gpt2):
    model = peft.get_peft_model(gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = torch.optim.AdamW(build_param_groups(model, 0.1))
    model.requires_grad_(True)
    added = new_param_groups(model, optimizer.param_groups, 0.1)
    answers = decays(added)
    assert answers[C_ATTN + "base_layer.weight"]
    assert not answers[C_ATTN + "base_layer.bias"]
    assert not answers[PREFIX + "transformer.ln_f.weight"]
    assert_partition(model, [*optimizer.param_groups, *added])


def test_quantized_base_weights_are_frozen_and_skipped(peft):
    class Linear4bit(nn.Linear):
        """As bitsandbytes keeps it: packed bytes that never train."""

        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)

    model = nn.Module()
    model.base_layer = Linear4bit()
    model.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
    assert decays(build_param_groups(model, 0.1)) == {"base_layer.bias": False, "lora_A.default.weight": True}
