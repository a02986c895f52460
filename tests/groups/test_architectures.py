"""Real models: hand-written answers for the tricky parameters, and how often other tools agree with them."""

import warnings

import pytest

from fused_adamw.cli import main
from fused_adamw.cli.inputs import inputs_of
from fused_adamw.cli.targets import load_target
from fused_adamw.groups import build_param_groups, explain_param_groups

from .architectures import CASES
from .helpers import assert_partition, decays
from .models import on_meta

pytestmark = pytest.mark.slow
NO_INPUTS = {"transformers:blip-2": "its configuration does not say which token stands for an image"}


@pytest.fixture(scope="session")
def build(timm, transformers, diffusers):
    made = {}

    def build(target):
        if target not in made:
            made[target] = detr(transformers) if target == "transformers:detr" else load_target(target)
        return made[target]

    return build


def detr(transformers):
    """DETR's default backbone is timm's; this is the same model on transformers' ResNet."""
    backbone = transformers.ResNetConfig(depths=[1, 1, 1, 1], out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone
    )
    return on_meta(transformers.DetrForObjectDetection, config)


def certain(case):
    """Name -> answer, for the parameters on which there is no choice."""
    return dict.fromkeys(case.decay.split(), True) | dict.fromkeys(case.no_decay.split(), False)


def convention(case):
    return {name: answer == "D" for name, _, answer in (item.rpartition("=") for item in case.policy.split())}


def test_the_table_is_large_enough():
    assert len(CASES) >= 40
    assert len({case.family for case in CASES}) >= 15
    assert all(len(certain(case)) + len(convention(case)) >= 5 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.target)
def test_answers(build, case):
    model = build(case.target)
    groups = build_param_groups(model, 0.1)
    answers = decays(groups)
    expected = certain(case) | convention(case)
    assert {name: answers[name] for name in expected} == expected
    assert_partition(model, groups)
    report = explain_param_groups(model)
    assert not [d.name for d in report.decisions if d.confidence == "low"]


def test_accuracy(build, capsys):
    """The share of the certain answers that each policy gets right; ours must be at least 99 %."""
    policies = ("hygiene", "timm", "huggingface", "nanogpt", "megatron", "all")
    right, total = dict.fromkeys(policies, 0), 0
    for case in CASES:
        model, expected = build(case.target), certain(case)
        total += len(expected)
        for policy in policies:
            answers = decays(build_param_groups(model, 0.1, policy=policy))
            right[policy] += sum(answers[name] is answer for name, answer in expected.items())
    shares = {policy: right[policy] / total for policy in policies}
    with capsys.disabled():
        said = ", ".join(f"{policy} {share:.1%}" for policy, share in shares.items())
        print(f"\n{total} tricky parameters of {len(CASES)} models: {said}")
    assert shares["hygiene"] >= 0.99
    assert shares["hygiene"] > max(share for policy, share in shares.items() if policy != "hygiene")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.target)
def test_use_agrees(build, case):
    """A forward pass changes no answer, contradicts nothing, and reaches most parameters."""
    model = build(case.target)
    inputs = inputs_of(case.target.partition(":")[0], model)
    if case.target in NO_INPUTS:
        pytest.skip(NO_INPUTS[case.target])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a forward pass that fails warns
        report = explain_param_groups(model, 0.1, example_inputs=inputs)
    assert not [d.name for d in report.decisions if d.contradicted]
    plain = {d.name: d for d in explain_param_groups(model, 0.1).decisions}
    assert [d.name for d in report.decisions if d.decays != plain[d.name].decays] == []
    reached = [d for d in report.decisions if "do not reach it" not in d.evidence]
    assert len(reached) > 0.7 * len(report.decisions)


class TestLibraryTargets:
    def test_timm(self, timm, capsys):
        assert main(["explain", "timm:resnet50"]) == 0
        assert "decay: 54 params" in capsys.readouterr().out
        assert main(["explain", "timm:resnet5"]) == 2
        assert "timm has no such model; did you mean resnet" in capsys.readouterr().err

    def test_transformers(self, transformers, capsys):
        assert main(["explain", "transformers:gpt2"]) == 0
        assert "decay: 48 params, 84,934,656 values" in capsys.readouterr().out
        assert main(["explain", "transformers:gpt17"]) == 2
        assert "transformers has no such model type" in capsys.readouterr().err

    def test_diffusers(self, diffusers, capsys):
        assert main(["explain", "diffusers:UNet2DModel"]) == 0
        assert main(["explain", "diffusers:Nothing"]) == 2
        assert "diffusers has no such model class" in capsys.readouterr().err
