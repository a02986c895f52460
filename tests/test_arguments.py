"""How the optimizer shows itself: its class's name, its own options, the line about its groups."""

import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from common import give_grads, parameters
from torch import nn

import fused_adamw
from fused_adamw import FusedHygieneAdamW

OPTIONS = {"max_grad_norm": 1.0, "skip_nonfinite": True, "state_dtype": torch.bfloat16}


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def test_a_class_by_torch_s_name():
    """What goes by the class's name, as checkpoints of Composer do, finds what it looks for."""
    optimizer = fused_adamw.AdamW(model(), max_grad_norm=1.0)
    assert type(optimizer).__name__ == type(optimizer).__qualname__ == torch.optim.AdamW.__qualname__
    assert isinstance(optimizer, FusedHygieneAdamW)
    assert type(pickle.loads(pickle.dumps(optimizer))) is fused_adamw.AdamW


def test_it_behaves_as_the_other_one():
    results = []
    for make in (fused_adamw.AdamW, FusedHygieneAdamW):
        calls = []
        params = parameters([(3, 4), (5,)])
        optimizer = make(params, lr=1e-2, max_grad_norm=0.5)
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("stepped"))
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        assert calls == ["stepped"] * 3
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_repr_and_defaults_show_the_options_that_are_set():
    optimizer = FusedHygieneAdamW(model(), norm_process_group=lambda sums: sums, **OPTIONS)
    text = repr(optimizer)
    assert text.startswith(
        "FusedHygieneAdamW (\nmax_grad_norm: 1.0\nskip_nonfinite: True\nnorm_process_group: <"
    )
    assert "\nstate_dtype: torch.bfloat16\nParameter Group 0\n" in text
    assert optimizer.defaults.items() >= OPTIONS.items()
    optimizer.max_grad_norm = None
    assert "max_grad_norm" not in optimizer.defaults
    assert "max_grad_norm" not in repr(optimizer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_options_are_no_keys_of_groups(duplicate):
    """Where they would end up in checkpoints, and be looked for in torch's."""
    original = FusedHygieneAdamW(model(), **OPTIONS)
    keys = set(torch.optim.AdamW(model().parameters()).param_groups[0])
    for optimizer in (original, duplicate(original)):
        optimizer.max_grad_norm = 2.0
        names = optimizer.param_groups[0].keys() & {"param_names"}
        added = {"params": parameters([(2,)])}
        optimizer.add_param_group({**added, "param_names": ["new"]} if names else added)
        for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
            assert all(set(group.keys()) - {"param_names"} == keys for group in groups)
        assert optimizer.defaults["max_grad_norm"] == 2.0


BUILD = """
import logging, os, torch
from fused_adamw import FusedHygieneAdamW
{before}
FusedHygieneAdamW({params})
"""
MODULE = "torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))"
GROUPS = "[AdamW Groups] decay: 1 params, no_decay: 3 params"
NO_HYGIENE = "[AdamW Groups] 4 params in one group, weight_decay=0.01 for all: no hygiene applied."


def lines_of(before="", params=MODULE, **environment):
    """What a fresh Python writes that builds an optimizer and has not heard of logging otherwise."""
    code = BUILD.format(before=before, params=params)
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "FUSED_ADAMW_LOG")}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**env, **environment}
    )
    assert not done.stdout
    return [line for line in done.stderr.splitlines() if "AdamW Groups" in line]


@pytest.mark.parametrize(("params", "line"), [(MODULE, GROUPS), (f"{MODULE}.parameters()", NO_HYGIENE)])
def test_the_line_about_groups_is_seen(params, line):
    (found,) = lines_of(params=params)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "silence",
    [
        {"FUSED_ADAMW_LOG": "0"},
        {"RANK": "1"},
        {"before": "logging.getLogger('fused_adamw').setLevel(logging.WARNING)"},
        {"before": "logging.getLogger('fused_adamw').disabled = True"},
        {"before": "logging.disable(logging.INFO)"},
        {"before": "logging.basicConfig(level=logging.WARNING)"},
        {"before": "logging.getLogger('fused_adamw').addHandler(logging.NullHandler())"},
    ],
    ids=str,
)
def test_the_line_about_groups_can_be_switched_off(silence):
    assert lines_of(**silence) == []


def test_logging_that_is_configured_shows_the_line_once_in_its_own_form():
    assert lines_of("logging.basicConfig(level=logging.INFO)") == [f"INFO:fused_adamw:{GROUPS}"]


def test_nothing_is_left_behind_in_logging():
    """A handler that stayed would show later lines twice where the application configures logging."""
    before = "FusedHygieneAdamW(torch.nn.Linear(2, 2)); logging.basicConfig(level=logging.INFO)"
    assert len(lines_of(before)) == 2
    assert not logging.getLogger("fused_adamw").handlers
