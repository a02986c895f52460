"""A disk that is full while examples/train.py saves: the checkpoint before stays whole, and it says so."""

import contextlib
import resource
import sys
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoints  # noqa: E402
import train  # noqa: E402

FULL = Path("/dev/full")
GPT = ["--model=gpt", "--layers=1", "--heads=2", "--width=16", "--context=16", f"--data={EXAMPLES}"]
GPT += ["--batch-size=4", "--seeds=1"]
WHOLE = "cannot be written, the one before it is whole: "

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@contextlib.contextmanager
def full_disk(path):
    """No space left where a checkpoint is first written."""
    path.with_suffix(".partial").symlink_to(FULL)
    yield


@contextlib.contextmanager
def small_files(path):
    """Files of 1 KiB at most, which end in the middle of a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(step, numel):
    return {"identity": {}, "step": step, "values": torch.full((numel,), float(step))}


@pytest.mark.parametrize("numel", [4, 4_000, 400_000])
@pytest.mark.parametrize("trouble", [full_disk, small_files])
def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, trouble, numel):
    path = tmp_path / "run.pt"
    checkpoints.save(state(1, numel), path)
    with trouble(path), pytest.raises(checkpoints.CheckpointError, match=rf"run\.pt {WHOLE}"):
        checkpoints.save(state(2, numel), path)
    assert [found.name for found in tmp_path.iterdir()] == ["run.pt"]
    assert checkpoints.load(path, {})["step"] == 1
    checkpoints.save(state(2, numel), path)
    assert checkpoints.load(path, {})["step"] == 2


def test_without_a_checkpoint_before(tmp_path):
    path = tmp_path / "run.pt"
    with full_disk(path), pytest.raises(checkpoints.CheckpointError, match="there is none before it"):
        checkpoints.save(state(1, 4), path)
    assert not list(tmp_path.iterdir())


def test_the_job_ends_with_a_message(tmp_path, capsys, threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(train, "draw_picture", lambda *args: None)
    argv = [*GPT, f"--out={tmp_path}", "--max-steps=6"]
    assert train.main([*argv, "--checkpoint=3"]) == 0
    path = tmp_path / "checkpoints" / "fused-seed0.pt"
    before = path.read_bytes()
    with full_disk(path):
        status = train.main([*argv[:-1], "--max-steps=12", "--resume"])
    assert status == 2
    assert f"train.py: error: {path} {WHOLE}" in capsys.readouterr().err
    assert path.read_bytes() == before
