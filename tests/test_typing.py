"""Snippets of the documentation pass `mypy --strict` in a user's own code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import scenes

ROOT = Path(__file__).parent.parent
# What snippets take for granted, as a user's code would have it typed.
PRELUDE = """
from __future__ import annotations
import math
import torch
from collections.abc import Iterable
from torch import Tensor, nn
from fused_adamw import AdamW, FusedHygieneAdamW, build_param_groups
Batch = dict[str, Tensor]
model = nn.Linear(2, 2)
loader: Iterable[Batch] = []
loss = torch.zeros(())
lr = 1e-3
log_every = 2
device = "cpu"
def loss_of(model: nn.Module, batch: Batch) -> Tensor: return loss
def log(name: str, value: float) -> None: ...
"""
MORE = """
optimizer = AdamW(model, max_grad_norm=1.0)
norm: float = optimizer.grad_norm.item()
if optimizer.grad_norm is not None:
    print(optimizer.grad_norm + 1, optimizer.skipped_steps.item())
optimizer.max_grad_norm = None
optimizer.max_grad_norm = math.inf
optimizer.step(lambda: 1.0)
optimizer.load_state_dict_by_name(optimizer.state_dict(), model.named_parameters())
optimizer.load_state_dict_by_name(optimizer.state_dict(), build_param_groups(model, policy="timm"))
optimizer.load_state_dict_by_name(optimizer.state_dict(), ["weight", "bias"], strict=False)
optimizer.load_state_dict_by_name(optimizer.state_dict())
FusedHygieneAdamW(model.parameters(), lr=torch.tensor(1e-3))
FusedHygieneAdamW(model.named_parameters(), norm_process_group=lambda sums: sums)
FusedHygieneAdamW([{"params": model.parameters(), "lr": 1e-2}], state_dtype=torch.bfloat16, backend="native")
FusedHygieneAdamW(model, master_weights="split", state_dtype="8bit", state_roles={"norm": torch.float32})
torch.optim.lr_scheduler.StepLR(optimizer, 1)
reveal_type(optimizer.skipped_steps)
"""


# What needs no other library, by page: all of it, or the sections that are named.
PAGES = {
    "README.md": None,
    "docs/integrations.md": ("Plain PyTorch",),
    "docs/migration.md": ("From torch AdamW and `clip_grad_norm_`", "Checkpoints with other groups"),
}


def snippets():
    """Code by the name of its file."""
    for page, sections in PAGES.items():
        blocks = [block for scene in scenes(page) for block in scene.blocks if block.language == "python"]
        for block in blocks:
            if sections is None or set(sections) & set(block.headings):
                yield f"{Path(page).stem}_{block.line}", block.code


@pytest.mark.slow
def test_users_pass_mypy_strict(tmp_path):
    """In one run: mypy reads all of torch for each."""
    found = {**dict(snippets()), "more": MORE}
    for name, code in found.items():
        (tmp_path / f"{name}.py").write_text(f"{PRELUDE}\n{code}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},  # an editable install is not found otherwise
    )
    theirs = 'Call to untyped function "backward"'  # torch's own
    errors = [line for line in done.stdout.splitlines() if ": error:" in line and theirs not in line]
    assert not errors
    assert f"checked {len(found)} source files" in done.stdout
    assert re.search(r'Revealed type is "torch\.\S*Tensor"', done.stdout)
