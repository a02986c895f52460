"""`python -m fused_adamw`."""

from __future__ import annotations

import pytest
import torch

from fused_adamw.__main__ import main


def test_info_names_every_backend_and_version(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("native", "triton", "reference", torch.__version__, "CPU kernels", "CUDA kernels"):
        assert word in out


def test_explain_prints_the_reason_of_a_decision(capsys):
    assert main(["explain", "torch.nn:TransformerEncoderLayer", "norm1.weight"]) != 0  # needs arguments
    assert main(["explain", "tests.test_main:small_model", "1.weight"]) == 0
    assert "1.weight" in capsys.readouterr().out


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["unknown"])
    assert "invalid choice" in capsys.readouterr().err
