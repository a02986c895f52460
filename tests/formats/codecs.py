"""What stores and loads under test, all with the functions of `oracle`: numpy in, numpy out."""

import numpy as np
import torch

from fused_adamw.formats import FORMATS, noise_hash, noise_word

# How numpy sees what a format keeps.
VIEW = {torch.bfloat16: (torch.int16, np.uint16)}


def to_numpy(t):
    """A tensor's values, bfloat16 as uint16."""
    seen, dtype = VIEW.get(t.dtype, (t.dtype, None))
    out = t.contiguous().view(seen).cpu().numpy()
    return out if dtype is None else out.view(dtype)


def to_torch(a, dtype, device):
    """The inverse of `to_numpy`."""
    seen, _ = VIEW.get(dtype, (dtype, None))
    return (
        torch.tensor(np.asarray(a).astype(np.int64) if seen != dtype else a).to(seen).view(dtype).to(device)
    )


class Torch:
    """fused_adamw/formats.py."""

    def __init__(self, device):
        self.device = device

    def store(self, name, x, noise=None):
        x = torch.tensor(x, device=self.device)
        if noise is not None:
            noise = torch.tensor(np.asarray(noise, np.int32), device=self.device)
        values, side = FORMATS[name].store(x, noise, x)
        return to_numpy(values), None if side is None else to_numpy(side)

    def load(self, name, values, side):
        format = FORMATS[name]
        values = to_torch(values, format.dtype, self.device)
        side = None if side is None else to_torch(side, format.side_dtype, self.device)
        return format.load(values, side).cpu().numpy()

    def noise_hash(self, seed, ordinal, step, index):
        index = torch.tensor(np.asarray(index).astype(np.int64), device=self.device)
        step = torch.tensor(step, dtype=torch.float64, device=self.device)
        return noise_hash(noise_word(seed, ordinal), step, index).cpu().numpy().astype(np.uint32)
