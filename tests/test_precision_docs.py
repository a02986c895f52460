"""docs/precision.md: its code runs, and its figures about bytes and roles are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_adamw
from fused_adamw import FusedHygieneAdamW
from fused_adamw.formats import FORMATS
from fused_adamw.state.precision import Precision

TEXT = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
BF16 = torch.bfloat16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(64, 128)
        self.hidden = nn.Linear(128, 128)
        self.lm_head = nn.Linear(128, 64, bias=False)
        self.to(BF16)


def test_every_snippet_runs():
    """In order: the last one saves the optimizer of the one before."""
    model = Model()
    names = {"torch": torch, **{name: getattr(fused_adamw, name) for name in fused_adamw.__all__}}
    codes = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(codes) == 3
    for code in codes:
        exec(code, names | {"model": model}, names)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        names["optimizer"].step()
        assert type(names["optimizer"]) is FusedHygieneAdamW
    assert set(names["saved"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_choices_take_the_bytes_that_are_said():
    rows = re.findall(r"^\| [^|]+ \| [^|`]*`([^|`]+)` \| ([\d.]+) \|$", TEXT, re.M)
    assert len(rows) == 6
    for call, nbytes in rows:
        chosen = eval(f"dict({call})", {"torch": torch})
        dtype = torch.float32 if chosen.keys() == {"state_dtype"} else BF16
        p = torch.empty(256, 1280, dtype=dtype, device="meta")
        kept = Precision(**chosen).formats_of(p, "matrix")
        found = sum(format.nbytes(p.shape) for format in kept) / p.numel()
        assert float(nbytes) == pytest.approx(found, abs=5e-3)


def test_the_definitions_are_those_of_the_codes():
    text = " ".join(TEXT.split())
    for name, levels, roots, unit in (("root_signed", 127, 2, "2^-31"), ("root_unsigned", 255, 3, "2^-15")):
        format = FORMATS[name]
        assert (format.levels, format.roots) == (levels, roots)
        assert f"k = {roots}, {levels} levels" in text
        assert format.unit == 2.0 ** float(unit.split("^")[1])
        assert f"levels · {unit}" in text
