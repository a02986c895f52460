"""Equal results first: a race between optimizers that do different things means nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from fused_adamw import EMA, FusedHygieneAdamW

from .cases import Precision
from .peers import Peer, float32_and_copy
from .problem import Problem, as_real

# Gradients of each step, in units of those that the clip halves: clipped, not clipped, clipped hard.
GRADIENT_SCALES = (1.0, 0.25, 4.0)

# Allowed difference, relative to the value plus the root mean square of all values of its kind: sums of terms
# of either sign come near zero with the rounding of the terms.
#   float32: each of three steps rounds a value a few times by up to 2^-24; the update divides by sqrt(v).
#   bfloat16: torch's clip, and its for-loop and foreach at every operation, round to 2^-9 where the fused
#   kernels compute in float32. Parameters move by lr, less than their own rounding of 2^-9.
TOLERANCE = {
    torch.float32: {"param": 1e-6, "exp_avg": 1e-6, "exp_avg_sq": 1e-6},
    torch.bfloat16: {"param": 2.0**-7, "exp_avg": 2.0**-7, "exp_avg_sq": 2.0**-6},
}


def norm_error(problem: Problem, params: Sequence[Tensor] | None = None) -> float:
    """By how much torch's norm, a float32 sum, differs from that summed in float64; relative.

    Args:
        problem: What is stepped.
        params: Whose gradients are summed; None: those of the problem.
    """
    grads = [p.grad for p in (problem.params if params is None else params) if p.grad is not None]
    return abs(float(get_total_norm(grads, foreach=True)) / problem.norm - 1.0)


def _results(problem: Problem) -> dict[str, list[Tensor]]:
    return {
        "param": [p.detach() for p in problem.params],
        "exp_avg": problem.exp_avgs,
        "exp_avg_sq": problem.exp_avg_sqs,
    }


def _run(problem: Problem, peer: Peer, ema: EMA | None = None) -> list[Tensor]:
    """Step from the start; what averages of the parameters are then, if any are asked for."""
    problem.reset()
    peer.restart()
    averages: list[Tensor] = []
    for scale in GRADIENT_SCALES:
        problem.set_gradients(scale)
        peer.step()
        if ema is not None and not averages:
            averages = [p.detach().clone() for p in problem.params]
        elif ema is not None:
            for average, p in zip(averages, problem.params, strict=True):
                average.lerp_(p.detach(), 1.0 - ema.averaging.decay)
    return averages


def _largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, int]:
    """The largest difference, relative as said above; and the tensor it is in."""
    squares = sum(torch.linalg.vector_norm(as_real(t), dtype=torch.float64).square() for t in expected)
    rms = (squares / sum(t.numel() for t in expected)) ** 0.5
    largest = []
    for a, b in zip(actual, expected, strict=True):
        a, b = as_real(a).float(), as_real(b).float()
        largest.append(((a - b).abs_() / (b.abs() + rms)).max())
    worst, index = torch.stack(largest).max(0)  # NaN is the largest
    return float(worst), int(index)


def check_equal_results(problem: Problem, peers: Sequence[Peer], reference: str = "") -> None:
    """Step every peer from the same start and compare with `reference`, which is one of them.

    It is torch's fused step, or foreach for complex parameters, if none is given.

    Raises:
        AssertionError: A peer computes something else; names the quantity and the tensor.

    In low precision nobody computes the same; there the reference is torch's AdamW in float32.
    """
    if problem.case.precision is not None:
        _check_close_to_float32(problem, peers, problem.case.precision)
        return
    reference = reference or ("foreach" if problem.case.dtype.is_complex else "fused")
    problem.set_gradients(1.0)
    # What torch's norm is off by, its peers' gradients are off by; exp_avg_sq is quadratic in them.
    error = norm_error(problem) if peers[0].clip else 0.0
    slack = {"param": error, "exp_avg": 2 * error, "exp_avg_sq": 4 * error}

    first = next(peer for peer in peers if peer.name == reference)
    averages = _run(problem, first, problem.case.besides and problem.case.besides.ema)
    expected = {key: [t.clone() for t in tensors] for key, tensors in _results(problem).items()}
    for peer in peers:
        if peer is first or peer.is_wrong:
            continue
        _run(problem, peer)
        results = _results(problem)
        if peer.averages is not None:
            results["average"], expected["average"] = peer.averages(), averages
        for key, tensors in results.items():
            kind = "param" if key == "average" else key
            allowed = TOLERANCE[problem.case.dtype.to_real()][kind] + slack[kind]
            difference, index = _largest_difference(tensors, expected[key])
            if not difference <= allowed:  # not `>`: false for NaN
                raise AssertionError(
                    f"{problem.case.name}: {peer.name} and {reference} differ after {len(GRADIENT_SCALES)} "
                    f"steps: {key} of tensor {index} by {difference:.1e}, allowed {allowed:.1e}"
                )
    problem.set_gradients(1.0)


# Of peers, whose formats are not ours: their updates are to be those of AdamW with the same options.
_PEERS_ERROR = 0.25


def _check_close_to_float32(problem: Problem, peers: Sequence[Peer], precision: Precision) -> None:
    """Compare the updates of all peers with those of float32, as vectors."""
    reference = float32_and_copy(problem, clip=peers[0].clip)
    start = torch.cat([t.float().flatten() for t in problem.start])
    problem.set_gradients(1.0)
    slack = norm_error(problem, problem.masters())  # of the reference's clip

    def moved(peer: Peer) -> Tensor:
        _run(problem, peer)
        weights = [p.detach() for p in problem.params] if peer.weights is None else peer.weights()
        return torch.cat([w.float().flatten() for w in weights]) - start

    expected = moved(reference)
    for peer in peers:
        mine = isinstance(peer.optimizer, FusedHygieneAdamW) and peer.has_own_state  # in these formats
        allowed = slack + (precision.error if mine else _PEERS_ERROR)
        error = float((moved(peer) - expected).norm() / expected.norm())
        if not error <= allowed:  # not `>`: false for NaN
            raise AssertionError(
                f"{problem.case.name}: {peer.name} and float32 differ after {len(GRADIENT_SCALES)} steps: "
                f"updates by {error:.1e}, allowed {allowed:.1e}"
            )
    problem.set_gradients(1.0)
