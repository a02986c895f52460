"""Checkpoints: written in one piece or not at all, and refused when they belong to another run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` always holds a whole checkpoint: the old one or the new one.

    Raises:
        CheckpointError: It cannot be written, as on a full disk. The old one is as it was, and nothing of the
            new one is left.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer has an error of its own
        partial.unlink(missing_ok=True)
        before = "the one before it is whole" if path.exists() else "there is none before it"
        raise CheckpointError(f"{path} cannot be written, {before}: {error}") from error


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the run that `identity` describes; refuse another one, naming what differs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["identity"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    differences = [
        f"{name} is {saved.get(name)} there and {identity.get(name)} here"
        for name in {**saved, **identity}
        if saved.get(name) != identity.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another model or run: {'; '.join(differences)}. "
            "Give the same settings to continue it, or --force-fresh to start over."
        )
    return state
