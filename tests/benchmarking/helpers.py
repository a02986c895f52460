"""What these tests share: devices, and a model of a few values."""

import torch

from benchmarks.cases import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FEW = Case("few", ((3, 5), (7,), (4, 2, 3), (1,)), group_of=(0, 1, 0, 1))
