"""One case's tensors, and the optimizers that step them: ours and what torch offers.

All optimizers of a race step the same memory: parameters, gradients and moments. None of them has a luckier
place than another, and a race needs the memory of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_adamw import FusedHygieneAdamW

from .cases import Case, Gradients
from .training import Training

# Passes over memory the size of the parameters, with and without the clip. The update reads p, g, m, v and
# writes p, m, v; a norm reads g; torch's clip reads and writes g; handing grad_scale to torch's fused
# optimizer makes it write g. The for-loop and foreach compute one operation after the other:
# p*=, m.lerp_(g), v*=, v+=g*g, sqrt, /=, +=, p+=m/denom.
PASSES = {
    "ours": (8, 7),
    "one-thread": (8, 7),
    "fused": (10, 7),
    "fused+grad_scale": (9, 7),
    "foreach": (23, 20),
    "for-loop": (23, 20),
    # Where ours does something besides. An average after the step reads it and the parameter, and writes it.
    "plain": (8, 7),
    "plain+average": (11, 10),
    "fused+average": (13, 10),
    "fused+timm": (13, 10),
}
# Bytes per value of the peers where ours keeps bfloat16 in low precision. A float32 step moves 40 or 28, its
# copy to bfloat16 reads 4 and writes 2.
LOW_PRECISION_BYTES = {"plain": (16, 14), "fused": (20, 14), "float32+copy": (46, 34)}
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1


def bytes_moved(case: Case, name: str, clip: bool) -> int | None:
    """Bytes that a step of a peer moves; None where nobody counted."""
    if case.precision is None:
        passes = PASSES.get(name)
        is_ours = case.besides is not None and name in ("ours", "one-thread")
        more = case.besides.passes if case.besides is not None and is_ours else 0
        return None if passes is None else case.bytes_moved(passes[not clip] + more)
    if name in ("torchao", "bitsandbytes"):
        return None
    return round(LOW_PRECISION_BYTES.get(name, case.precision.moved)[not clip] * case.numel)


class Problem:
    """The tensors of one case, with a start that can be gone back to."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            return [
                torch.empty(shape, dtype=case.dtype, device=device).normal_(0.0, scale, generator=generator)
                for shape in case.shapes
            ]

        self._training: Training | None = None
        if case.training is None:
            self.params: list[Tensor] = [nn.Parameter(p) for p in normal(0.02)]
        else:
            with torch.device(device):
                self._training = case.training(*case.size)
            self.params = list(self._training.model.parameters())
        self.start = [p.detach().clone() for p in self.params]
        self.gradients = normal(0.01)
        self.exp_avgs = [torch.zeros_like(p) for p in self.start]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.start]
        self._grads = [torch.empty_like(p) for p in self.start]
        self._spare: list[Tensor] = []
        self._masters: list[Tensor] = []
        self.set_gradients(1.0)
        squares = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in self.gradients)
        self.norm = float(squares) ** 0.5
        self.max_norm = 0.5 * self.norm

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start."""
        for p, start, m, v in zip(self.params, self.start, self.exp_avgs, self.exp_avg_sqs, strict=True):
            p.copy_(start)
            m.zero_()
            v.zero_()
        for master, start in zip(self._masters, self.start, strict=False):
            master.copy_(start)

    def set_gradients(self, scale: float) -> None:
        """Fill the gradients anew; torch's clip has changed them."""
        for p, grad, source in zip(self.params, self._grads, self.gradients, strict=True):
            torch.mul(source, scale, out=grad)
            p.grad = grad
        for master, grad in zip(self._masters, self._grads, strict=False):
            master.grad = grad.float()

    def masters(self) -> list[Tensor]:
        """The parameters in float32, with gradients in float32: for peers that train so."""
        if not self._masters:
            self._masters = [start.float().requires_grad_() for start in self.start]
            for master, grad in zip(self._masters, self._grads, strict=True):
                master.grad = grad.float()
        return self._masters

    def move_gradients(self) -> None:
        """Put every gradient at another address."""
        if not self._spare:
            self._spare = [grad.clone() for grad in self._grads]
        self._grads, self._spare = self._spare, self._grads
        for p, grad in zip(self.params, self._grads, strict=True):
            p.grad = grad

    def backward(self) -> None:
        """Make the gradients anew, by a forward and a backward pass of the case's model."""
        assert self._training is not None
        self._training.backward()

    def before_step(self, gradients: Gradients) -> Callable[[], None] | None:
        """What comes before a step whose gradients are so; None: nothing."""
        return {"kept": None, "moved": self.move_gradients, "new": self.backward}[gradients]

    def param_groups(self, params: Sequence[Tensor] | None = None) -> list[dict[str, Any]]:
        """The groups: layer-wise learning rates, every other group without weight decay.

        Args:
            params: What to step in the place of the parameters.
        """
        params = self.params if params is None else params
        return [
            {
                "params": [params[i] for i in members],
                "lr": LR * 0.9 ** (number // 2),
                "weight_decay": WEIGHT_DECAY * (number % 2 == 0),
            }
            for number, members in enumerate(self.case.groups)
        ]

    def share_state(self, optimizer: torch.optim.Optimizer, *, step_on_device: bool) -> None:
        """Give an optimizer the problem's moments, and step counts of its own."""
        for p, m, v in zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            step = torch.zeros((), device=self.device if step_on_device else None)
            optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class Peer:
    """An optimizer in a race: ours, or one of torch's.

    Attributes:
        name: What tables call it.
        step: One step, with the clip if the race has one.
        optimizer: Whose state it mutates.
        clip: Whether it clips.
        threads: CPU threads that it uses; None: those of the race.
        has_own_state: Whether its state is not the problem's.
        weights: What it has made of the parameters, in float32; None: what the parameters are.
        averages: The averages of the parameters that it keeps; None: it keeps none.
        forget: Lets averages begin anew; None: step counts do so.
    """

    name: str
    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    clip: bool
    threads: int | None = None
    has_own_state: bool = False
    weights: Callable[[], list[Tensor]] | None = None
    averages: Callable[[], list[Tensor]] | None = None
    forget: Callable[[], object] | None = None

    def restart(self) -> None:
        """Set the step counts to zero; drop a state that is no other's."""
        if self.forget is not None:
            self.forget()
        if self.has_own_state:
            self.optimizer.state.clear()
            return
        for state in self.optimizer.state.values():
            state["step"].zero_()


def ours(
    problem: Problem, *, clip: bool, backend: str = "auto", name: str = "ours", is_plain: bool = False
) -> Peer:
    """FusedHygieneAdamW, in the precision of the case and with what it does besides, unless `is_plain`."""
    precision = None if is_plain else problem.case.precision
    besides = None if is_plain else problem.case.besides
    optimizer = FusedHygieneAdamW(
        problem.param_groups(),
        betas=BETAS,
        max_grad_norm=problem.max_norm if clip else None,
        backend=backend,
        **({"stochastic_rounding": False} if precision is None else dict(precision.options)),
        **({} if besides is None else dict(besides.options)),
    )
    if precision is None:
        problem.share_state(optimizer, step_on_device=True)
        peer = Peer(name, optimizer.step, optimizer, clip)
        if besides is None or besides.ema is None:
            return peer
        return replace(peer, averages=lambda: [optimizer.state[p]["ema"] for p in problem.params])

    def weights() -> list[Tensor]:
        found = optimizer.master_state_dict(nn.ParameterList(problem.params))
        return [w.float() for w in found.values()]

    return Peer(name, optimizer.step, optimizer, clip, has_own_state=True, weights=weights)


def plain(problem: Problem, *, clip: bool) -> Peer:
    """Ours in the formats that torch has, to nearest, and nothing besides."""
    return ours(problem, clip=clip, name="plain", is_plain=True)


def one_thread(problem: Problem, *, clip: bool) -> Peer:
    """Ours on one CPU thread, which more of them are not to be slower than."""
    return replace(ours(problem, clip=clip, name="one-thread"), threads=1)


def _torch_adamw(problem: Problem, **kind: bool) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(problem.param_groups(), betas=BETAS, **kind)
    problem.share_state(optimizer, step_on_device="fused" in kind or "capturable" in kind)
    return optimizer


def _preceded_by_clip(problem: Problem, step: Callable[[], object], clip: bool) -> Callable[[], object]:
    if not clip:
        return step

    def clip_and_step() -> None:
        clip_grad_norm_(problem.params, problem.max_norm, foreach=True)
        step()

    return clip_and_step


def fused(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(fused=True)."""
    optimizer = _torch_adamw(problem, fused=True)
    return Peer("fused", _preceded_by_clip(problem, optimizer.step, clip), optimizer, clip)


def foreach(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(foreach=True)."""
    optimizer = _torch_adamw(problem, foreach=True)
    return Peer("foreach", _preceded_by_clip(problem, optimizer.step, clip), optimizer, clip)


def for_loop(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(foreach=False), the default on a CPU."""
    optimizer = _torch_adamw(problem, foreach=False)
    return Peer("for-loop", _preceded_by_clip(problem, optimizer.step, clip), optimizer, clip)


def fused_with_grad_scale(problem: Problem, *, clip: bool) -> Peer:
    """The fastest that torch has: its fused step divides by `grad_scale`, which is not documented."""
    optimizer: Any = _torch_adamw(problem, fused=True)

    def norm_and_step() -> None:
        norm = get_total_norm([p.grad for p in problem.params if p.grad is not None], foreach=True)
        optimizer.grad_scale = ((norm.float() + 1e-6) / problem.max_norm).clamp(min=1.0)
        optimizer.step()

    return Peer("fused+grad_scale", norm_and_step if clip else optimizer.step, optimizer, clip)


def compiled(problem: Problem, *, clip: bool) -> Peer:
    """torch.compile of clip + step; compiling takes a minute for hundreds of tensors."""
    optimizer = _torch_adamw(problem, foreach=True, capturable=problem.device.type == "cuda")
    step = torch.compile(_preceded_by_clip(problem, lambda: optimizer.step(), clip))
    return Peer("compiled", step, optimizer, clip)


def float32_and_copy(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(fused=True) of float32 parameters, and a copy in bfloat16, as autocast makes it."""
    masters = problem.masters()
    optimizer = torch.optim.AdamW(problem.param_groups(masters), betas=BETAS, fused=True)

    @torch.no_grad()
    def step() -> None:
        if clip:
            clip_grad_norm_(masters, problem.max_norm, foreach=True)
        optimizer.step()
        torch._foreach_copy_(problem.params, masters)

    return Peer(
        "float32+copy",
        step,
        optimizer,
        clip,
        has_own_state=True,
        weights=lambda: [p.detach() for p in masters],
    )


def torchao(problem: Problem, *, clip: bool) -> Peer:
    """The 8-bit AdamW of torchao with stochastic rounding of bfloat16 parameters; it compiles itself."""
    optimizer = import_module("torchao.optim").AdamW8bit(
        problem.param_groups(), betas=BETAS, bf16_stochastic_round=True
    )
    step = _preceded_by_clip(problem, optimizer.step, clip)
    return Peer("torchao", step, optimizer, clip, has_own_state=True)


def bitsandbytes(problem: Problem, *, clip: bool) -> Peer:
    """8-bit AdamW of bitsandbytes."""
    optimizer = import_module("bitsandbytes.optim").AdamW8bit(problem.param_groups(), betas=BETAS)
    step = _preceded_by_clip(problem, optimizer.step, clip)
    return Peer("bitsandbytes", step, optimizer, clip, has_own_state=True)


def _averaged(problem: Problem, peer: Peer) -> Peer:
    """A peer whose parameters torch averages after each step."""
    ema = problem.case.besides and problem.case.besides.ema
    assert ema
    update = get_ema_multi_avg_fn(ema.averaging.decay)
    averages = AveragedModel(model := nn.ParameterList(problem.params), multi_avg_fn=update)

    def step() -> None:
        peer.step()
        averages.update_parameters(model)

    return replace(
        peer,
        name=f"{peer.name}+average",
        step=step,
        averages=lambda: [p.detach() for p in averages.parameters()],
        forget=averages.n_averaged.zero_,
    )


def fused_and_average(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(fused=True), and torch's AveragedModel."""
    return _averaged(problem, fused(problem, clip=clip))


def plain_and_average(problem: Problem, *, clip: bool) -> Peer:
    """Ours without averages, and torch's AveragedModel."""
    return _averaged(problem, plain(problem, clip=clip))


def fused_and_timm(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(fused=True), and the ModelEmaV3 of timm."""
    ema = problem.case.besides and problem.case.besides.ema
    assert ema
    peer, model = fused(problem, clip=clip), nn.ParameterList(problem.params)
    averages = import_module("timm.utils").ModelEmaV3(model, decay=ema.averaging.decay)
    n_updates = itertools.count(1)

    def step() -> None:
        peer.step()
        averages.update(model, step=next(n_updates))

    def forget() -> None:
        nonlocal n_updates
        n_updates = itertools.count(1)

    def kept() -> list[Tensor]:
        return [p.detach() for p in averages.module.parameters()]

    return replace(peer, name="fused+timm", step=step, averages=kept, forget=forget)


BESIDES_PEERS = {
    "plain": plain,
    "fused": fused,
    "plain+average": plain_and_average,
    "fused+average": fused_and_average,
    "fused+timm": fused_and_timm,
}
LOW_PRECISION_PEERS = {
    "plain": plain,
    "fused": fused,
    "float32+copy": float32_and_copy,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
}
PEERS = {
    "one-thread": one_thread,
    "fused": fused,
    "fused+grad_scale": fused_with_grad_scale,
    "foreach": foreach,
    "for-loop": for_loop,
    "compiled": compiled,
}


def make_peers(
    problem: Problem, names: tuple[str, ...], *, clip: bool, backends: tuple[str, ...] = ("auto",)
) -> Iterator[Peer]:
    """Ours, once per backend, then the named peers.

    With one backend ours is called "ours", otherwise by the backend. Without a clip nothing is handed to
    `grad_scale`, and that peer is left out. A case in low precision, or in which ours does something besides,
    has peers of its own, those that are installed; of the named ones it has one thread of ours.
    """
    if problem.case.precision is not None:
        names = (*filter(_is_installed, LOW_PRECISION_PEERS), *({"one-thread"} & set(names)))
    if problem.case.besides is not None:
        peers = BESIDES_PEERS if problem.case.besides.ema is not None else ("plain", "fused")
        names = (*filter(_is_installed, peers), *({"one-thread"} & set(names)))
    for backend in backends:
        yield ours(problem, clip=clip, backend=backend, name="ours" if len(backends) == 1 else backend)
    for name in names:
        if clip or name != "fused+grad_scale":
            yield (PEERS | LOW_PRECISION_PEERS | BESIDES_PEERS)[name](problem, clip=clip)


_NEEDED = {
    "torchao": ["torchao"],
    "bitsandbytes": ["bitsandbytes"],
    "fused+timm": ["timm", "torchvision"],  # which timm imports
}


def _is_installed(name: str) -> bool:
    return all(find_spec(module) is not None for module in _NEEDED.get(name, ()))
