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


def model_with_odd_layouts() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4).bfloat16()
    )
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    return model


def test_info_tells_what_steps_a_model(capsys, monkeypatch):
    pytest.importorskip("fused_adamw._C", exc_type=ImportError)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["info", "--model", "tests.test_main:model_with_odd_layouts"]) == 0
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")
    ]
    assert ["native", "cpu", "float32", "float32", "float32", "3", "12"] in rows
    assert ["native", "cpu", "bfloat16", "bfloat16", "bfloat16", "2", "20"] in rows
    assert ["reference", "cpu", "any", "any", "any", "1", "16"] in rows
    assert "0.weight is stepped by the reference: parameter is not dense: strides (8, 2)" in out
    assert out.count("is stepped by the reference") == 1


def meta_model() -> torch.nn.Module:
    with torch.device("meta"):
        return small_model()


def test_info_gives_memory_to_a_model_without(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["info", "--model", "tests.test_main:meta_model"]) == 0
    out = capsys.readouterr().out
    assert "Sequential, one step:" in out
    assert "meta" not in out
    (row,) = [line for line in out.splitlines() if "│ 28 " in line]  # 4 * 4 + 3 * 4 values
    assert " cpu " in row
    assert " 4 " in row


def test_info_does_not_cut_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", "--model", "tests.test_main:large_model"]) == 0
    assert "│ 10,000,000 │" in capsys.readouterr().out


def large_model() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Linear(10_000, 1_000, bias=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("target", ["nonsense", "torch.nn:Flatten", "torch.nn:Missing"])
def test_info_of_no_model_is_refused(capsys, target):
    assert main(["info", "--model", target]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["unknown"])
    assert "invalid choice" in capsys.readouterr().err
