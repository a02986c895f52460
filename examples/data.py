"""The data of the example: bytes of real text for the GPT, handwritten digits for the ResNet."""

from __future__ import annotations

import random
import sysconfig
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 0.1
VALIDATION_CAP = 256  # examples: enough for a steady validation loss, few enough to be evaluated often
TEXT_CAP = 8 * 2**20  # bytes
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Split:
    """Examples of one split: `inputs[i]` is answered by `targets[i]`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Data:
    """What a model is trained and validated on; `fingerprint` tells one data set from another."""

    train: Split
    validation: Split
    description: str
    fingerprint: int


def python_files(root: Path) -> list[Path]:
    """Return the modules under `root`, without tests and installed packages, in a fixed mixed order."""
    files = [path for path in root.rglob("*.py") if NOT_TEXT.isdisjoint(path.relative_to(root).parts)]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    random.Random(0).shuffle(files)  # any prefix of the list is then a fair sample of the library
    return files


def read_text(path: Path | None) -> bytes:
    """Read a file, all files of a directory, or (None) Python's standard library, up to `TEXT_CAP` bytes."""
    if path is None:
        files = python_files(Path(sysconfig.get_paths()["stdlib"]))
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [path]
    text = bytearray()
    for file in files:
        with file.open("rb") as stream:
            text += stream.read(TEXT_CAP - len(text))
        if len(text) == TEXT_CAP:
            break
    return bytes(text)


def text_data(path: Path | None, context: int, share: float = 1.0) -> Data:
    """Cut text into windows of `context` bytes, each to be answered by the bytes one further on.

    The last tenth of the text is held out. `share` keeps that part of the training text.
    """
    text = read_text(path)
    tokens = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    border = round(len(text) * (1 - VALIDATION_SHARE))
    train, validation = tokens[: round(border * share)], tokens[border:]
    if min(len(train), len(validation)) <= context:
        raise ValueError(
            f"{path or 'the standard library'} holds {len(text)} bytes: too few for one training and one "
            f"validation window of {context} bytes"
        )

    def windows(part: Tensor) -> Split:
        window = part.unfold(0, context + 1, context)
        return Split(window[:, :-1], window[:, 1:])

    held_out = windows(validation)
    step = -(-len(held_out) // VALIDATION_CAP)  # spread the windows over all of the held-out text
    held_out = Split(held_out.inputs[::step], held_out.targets[::step])
    source = path or "Python's standard library"
    return Data(
        train=windows(train),
        validation=held_out,
        description=f"{len(train) / 1e6:.2f} MB of {source}",
        fingerprint=zlib.crc32(text[: len(train)]),
    )


def digits_data(share: float = 1.0) -> Data:
    """Load scikit-learn's 1797 handwritten digits of 8x8 pixels; a fifth is held out, chosen at random."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16 - 0.3
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    border = len(order) // 5
    held_out, train = order[:border], order[border:]
    train = train[: round(len(train) * share)]
    return Data(
        train=Split(images[train], labels[train]),
        validation=Split(images[held_out], labels[held_out]),
        description=f"{len(train)} handwritten digits",
        fingerprint=zlib.crc32(images[train].numpy().tobytes()),
    )


class Batches:
    """Shuffled batches of a split, epoch after epoch.

    Batch `k` is a function of the seed and `k` alone, so the position in the data is one integer.
    """

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        if batch_size > len(split):
            raise ValueError(
                f"a batch of {batch_size} is more than the {len(split)} training examples there are"
            )
        self.split = split
        self.batch_size = batch_size
        self.per_epoch = len(split) // batch_size
        self._order = lru_cache(maxsize=1)(
            lambda epoch: torch.randperm(
                len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            )
        )

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(position, self.per_epoch)
        chosen = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return self.split.inputs[chosen], self.split.targets[chosen]
