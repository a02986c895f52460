"""muP in numbers: how the change that training makes to each layer depends on width."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_adamw.cli import main
from fused_adamw.cli.coord_check import Check, slope

ROOT = Path(__file__).parent.parent
IDS = (torch.zeros(4, 16, dtype=torch.long),)
WIDTHS = [64, 128, 256]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from examples.mup import build

    return build


def test_activations_of_the_example_keep_their_size(example):
    """Under muP, what training changes does not depend on width; with one learning rate it grows."""
    check = Check(IDS, steps=3, seeds=2, lr=1e-2)
    plain = check.changes(lambda width: example(width, mup=False), WIDTHS, scales=False)
    scaled = check.changes(example, WIDTHS, scales=True)
    assert set(plain) == set(scaled)
    for layer, by_width in scaled.items():
        assert abs(slope(by_width)) < 0.3, layer
    for layer in ("blocks.0.attention.out", "blocks.0.mlp.2", "blocks.1.attention.out", "blocks.1.mlp.2"):
        assert slope(plain[layer]) > 0.8
    assert slope(plain["head"]) > 0.3


def test_without_its_multiplier_the_output_grows(example):
    def build(width):
        model = example(width)
        model.head._forward_hooks.clear()
        return model

    changes = Check(IDS, steps=3, seeds=2, lr=1e-2).changes(build, WIDTHS, scales=True)
    assert slope(changes["head"]) > 0.5


def test_slope():
    assert slope({64: 1.0, 128: 2.0, 256: 4.0}) == pytest.approx(1.0)
    assert slope({64: 3.0, 128: 3.0}) == 0.0
    assert slope({64: 4.0, 256: 1.0}) == pytest.approx(-1.0)


def test_random_numbers_stay_as_they_were(example):
    state = torch.get_rng_state()
    Check(IDS, steps=1, seeds=1, lr=1e-2).changes(example, [32, 64], scales=True)
    assert torch.equal(torch.get_rng_state(), state)


class TestCommand:
    def run(self, *arguments):
        return main(["coord-check", *arguments])

    @pytest.fixture(autouse=True)
    def beside_the_examples(self, example, monkeypatch):
        monkeypatch.setenv("FUSED_ADAMW_LOG", "0")

    def test_table_and_plot(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        file = tmp_path / "check.png"
        status = self.run(
            "examples.mup:build",
            "--inputs",
            "2,8:int64",
            "--widths",
            "32,64",
            "--seeds",
            "1",
            "--plot",
            str(file),
        )
        assert status == 0
        assert "blocks.1.mlp.2" in capsys.readouterr().out
        assert file.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["examples.mup:build", "--inputs", "2,8:int64", "--steps", "0"],
                "--steps and --seeds: expected",
            ),
            (["examples.mup:BASE_WIDTH", "--inputs", "2,8:int64"], "expected a function of width"),
            (["examples.mup:nothing", "--inputs", "2,8:int64"], "nothing"),
            (["examples.mup", "--inputs", "2,8:int64"], "expected package.module:factory"),
        ],
    )
    def test_refusals(self, arguments, message, capsys):
        assert self.run(*arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("widths", ["64", "64,x", "0,1"])
    def test_widths(self, widths, capsys):
        with pytest.raises(SystemExit):
            self.run("examples.mup:build", "--inputs", "2,8:int64", "--widths", widths)
        assert "expected two widths or more" in capsys.readouterr().err


def test_keyword_inputs_and_numbers():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 5)

        def forward(self, x):
            return {"y": 0}, self.c(self.b(self.a(x).relu()).relu())

    with pytest.raises(ValueError, match="expected a model that returns logits"):
        Check({"x": torch.zeros(4, 3)}, 1, 1, 1e-2).changes(Model, [8, 16], scales=False)
