"""The optimizers that step a problem: ours, torch's, and those of other packages that are installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_adamw import FusedHygieneAdamW

from .cases import Case
from .problem import Problem

# Passes over memory the size of the parameters, with and without the clip. The update reads p, g, m, v and
# writes p, m, v; a norm reads g; torch's clip reads and writes g; handing grad_scale to torch's fused
# optimizer makes it write g. The for-loop and foreach compute one operation after the other:
# p*=, m.lerp_(g), v*=, v+=g*g, sqrt, /=, +=, p+=m/denom.
PASSES = {
    "ours": (8, 7),
    "one-thread": (8, 7),
    "fused": (10, 7),
    "fused-wrong": (10, 7),
    "deepspeed": (10, 7),
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
# Where gradients are bfloat16 and all else float32. What takes no such gradients copies them, 2 bytes to 4.
_ours, _copied = (28, 26), (46, 34)
OFFLOADED_BYTES = {"ours": _ours, "one-thread": _ours, "fused": _copied, "deepspeed": _copied}
LOW_PRECISION_BYTES = {"plain": (16, 14), "fused": (20, 14), "float32+copy": (46, 34)}
BETAS = (0.9, 0.95)


def bytes_moved(case: Case, name: str, clip: bool) -> int | None:
    """Bytes that a step of a peer moves; None where nobody counted."""
    if case.grad_dtype is not None:
        return OFFLOADED_BYTES[name][not clip] * case.numel if name in OFFLOADED_BYTES else None
    if case.has_other_grads:
        copied = case.bytes_copied if name != "fused-wrong" else 0
        return None if name not in PASSES else case.bytes_moved(PASSES[name][not clip]) + copied
    if case.precision is None:
        passes = PASSES.get(name)
        is_ours = case.besides is not None and name in ("ours", "one-thread")
        more = case.besides.passes if case.besides is not None and is_ours else 0
        return None if passes is None else case.bytes_moved(passes[not clip] + more)
    if name in ("torchao", "bitsandbytes"):
        return None
    return round(LOW_PRECISION_BYTES.get(name, case.precision.moved)[not clip] * case.numel)


@dataclass(frozen=True)
class Peer:
    """An optimizer in a race: ours, or one of torch's.

    Attributes:
        name: What tables call it.
        step: One step, with the clip if the race has one.
        optimizer: Whose state it mutates.
        clip: Whether it clips.
        threads: CPU threads that it uses; None: those of the race.
        is_wrong: Whether its results are known to be wrong: its time is compared, and nothing else.
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
    is_wrong: bool = False
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
            step = state["step"]
            state["step"] = step.zero_() if isinstance(step, Tensor) else 0


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
        problem.share_state(optimizer, problem.new_step)
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
    optimizer = torch.optim.AdamW(problem.param_groups(problem.params_alike()), betas=BETAS, **kind)
    is_on_device = "fused" in kind or "capturable" in kind
    problem.share_state(optimizer, problem.new_step if is_on_device else lambda: torch.zeros(()))
    return optimizer


def _converted(problem: Problem, step: Callable[[], object]) -> Callable[[], object]:
    """A step after what makes gradients of the parameters' dtype and layout, where they have others."""
    if not problem.case.has_other_grads:
        return step

    def convert_and_step() -> None:
        problem.convert_gradients()
        step()

    return convert_and_step


def _preceded_by_clip(problem: Problem, step: Callable[[], object], clip: bool) -> Callable[[], object]:
    params = problem.params_alike()

    def clip_and_step() -> None:
        clip_grad_norm_(params, problem.max_norm, foreach=True)
        step()

    return _converted(problem, clip_and_step if clip else step)


def fused(problem: Problem, *, clip: bool) -> Peer:
    """torch.optim.AdamW(fused=True)."""
    optimizer = _torch_adamw(problem, fused=True)
    return Peer("fused", _preceded_by_clip(problem, optimizer.step, clip), optimizer, clip)


def fused_wrong(problem: Problem, *, clip: bool) -> Peer:
    """The same with gradients of another layout than parameters as they are, which it mistakes for theirs."""
    optimizer = torch.optim.AdamW(problem.param_groups(), betas=BETAS, fused=True)
    problem.share_state(optimizer, problem.new_step)

    def step() -> None:
        if clip:
            clip_grad_norm_(problem.params, problem.max_norm, foreach=True)
        optimizer.step()

    return Peer("fused-wrong", step, optimizer, clip, is_wrong=True)


def deepspeed(problem: Problem, *, clip: bool) -> Peer:
    """The CPUAdam of DeepSpeed, which compiles itself. It reads gradients as if of the parameters' dtype."""
    params = problem.params_alike()
    optimizer = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(
        problem.param_groups(params), betas=BETAS
    )
    problem.share_state(optimizer, int)
    return Peer("deepspeed", _preceded_by_clip(problem, optimizer.step, clip), optimizer, clip)


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
        norm = get_total_norm([p.grad for p in problem.params_alike() if p.grad is not None], foreach=True)
        optimizer.grad_scale = ((norm.float() + 1e-6) / problem.max_norm).clamp(min=1.0)
        optimizer.step()

    step = norm_and_step if clip else optimizer.step
    return Peer("fused+grad_scale", _converted(problem, step), optimizer, clip)


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
    "deepspeed": deepspeed,
    "foreach": foreach,
    "for-loop": for_loop,
    "compiled": compiled,
}

_ALL_PEERS = PEERS | LOW_PRECISION_PEERS | BESIDES_PEERS | {"fused-wrong": fused_wrong}


def make_peers(
    problem: Problem, names: tuple[str, ...], *, clip: bool, backends: tuple[str, ...] = ("auto",)
) -> Iterator[Peer]:
    """Ours, once per backend, then the named peers.

    With one backend ours is called "ours", otherwise by the backend. Left out are those that are not
    installed, and without a clip the one of `grad_scale`, to which nothing would be handed. A case in low
    precision, or in which ours does something besides, has peers of its own; of the named ones it has one
    thread of ours.
    """
    if problem.case.precision is not None:
        names = (*LOW_PRECISION_PEERS, *({"one-thread"} & set(names)))
    if problem.case.besides is not None:
        peers = BESIDES_PEERS if problem.case.besides.ema is not None else ("plain", "fused")
        names = (*peers, *({"one-thread"} & set(names)))
    for backend in backends:
        yield ours(problem, clip=clip, backend=backend, name="ours" if len(backends) == 1 else backend)
    for name in filter(_is_installed, names):
        if clip or name != "fused+grad_scale":
            yield _ALL_PEERS[name](problem, clip=clip)


_NEEDED = {
    "torchao": ["torchao"],
    "bitsandbytes": ["bitsandbytes"],
    "deepspeed": ["deepspeed"],
    "fused+timm": ["timm", "torchvision"],  # which timm imports
}


def not_installed() -> list[str]:
    """The peers that races lack here, as their packages are not installed."""
    return [name for name in _NEEDED if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    return all(find_spec(module) is not None for module in _NEEDED.get(name, ()))
