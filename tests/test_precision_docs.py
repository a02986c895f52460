"""docs/precision.md: its figures about bytes and roles are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fused_adamw.formats import FORMATS
from fused_adamw.state.precision import Precision

TEXT = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
BF16 = torch.bfloat16


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
