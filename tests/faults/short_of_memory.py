"""Lets allocations of a step fail, one at a time: `python short_of_memory.py plain later ours 1`.

Runs with the library of allocations.cpp preloaded. Arguments: what is stepped, of `PROBLEMS`; at which
moment, of `MOMENTS`; whose allocations, of `KINDS`; and a stride: the last one fails, the one so many before
it, and so on. Prints how many there are, and how often each of `OUTCOMES` came.
"""

import ctypes
import faulthandler
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import Target, give_grads, parameters

from fused_adamw import EMA, SpikeGuard

LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
LIBRARY.fail_at.restype = None
KINDS = ["ours", "python"]  # enum Kind
SHAPES = [(3, 4), (200,), ()]


def plain():
    return parameters(SHAPES)


def low_precision():
    return parameters(SHAPES, dtype=torch.bfloat16)


def two_launches():
    return [*parameters(SHAPES[:2]), *parameters(SHAPES[1:], dtype=torch.float64)]


def copied_grads():
    """Gradients are contiguous, the first parameter is not; beside complex ones."""
    params = [*parameters(SHAPES), *parameters(SHAPES[1:], dtype=torch.complex64)]
    params[0].data = params[0].data.t().contiguous().t()
    return params


@dataclass(frozen=True)
class Problem:
    """What is stepped.

    Attributes:
        make: Gives the parameters.
        backend: That steps them.
        options: Of the optimizer.
    """

    make: Callable
    backend: str = "native"
    options: dict = field(default_factory=dict)


PROBLEMS = {
    "plain": Problem(plain),
    "low_precision": Problem(low_precision, options={"state_dtype": torch.bfloat16}),
    "besides": Problem(plain, options={"stats": True, "ema": EMA(0.9), "guard": SpikeGuard()}),
    "two_launches": Problem(two_launches),
    "copied_grads": Problem(copied_grads),
    "reference": Problem(plain, backend="reference"),
}


def add_group(optimizer, params):
    optimizer.add_param_group({"params": parameters([(5, 6)])})


def move(optimizer, params):
    params[0].data = params[0].data.clone()


# How many steps come before, and what else.
MOMENTS = {
    "first": (0, lambda *args: None),
    "later": (2, lambda *args: None),
    "replanned": (2, add_group),
    "moved": (2, move),
}


def values(optimizer):
    """Copies of all that a step changes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {(i, "parameter"): p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {(i, name): value.clone() for name, value in optimizer.state.get(p, {}).items()}
    return found


def is_at(found, expected):
    return found.keys() == expected.keys() and all(map(torch.equal, found.values(), expected.values()))


def prepared(problem, moment):
    """An optimizer that is about to step."""
    params, (steps, act) = problem.make(), MOMENTS[moment]
    optimizer = Target(problem.backend, "cpu").adamw(params, lr=0.1, max_grad_norm=1.0, **problem.options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    act(optimizer, params)
    give_grads([p for group in optimizer.param_groups for p in group["params"]], 9)
    return optimizer


def let_nothing_fail():
    """From now on. The call takes memory itself: what fails then is not the step's."""
    try:
        LIBRARY.fail_at(0, 0)
    except MemoryError:
        LIBRARY.fail_at(0, 0)


def is_whole(found, before, after):
    """Whether each parameter is as after the step, or as before, but for a state that counts no step."""

    def of(values, i):
        return {name: value for (j, name), value in values.items() if j == i}

    def is_before(i):
        mine, old = of(found, i), of(before, i)
        is_new = len(old) == 1 and mine["step"] == 0
        return is_at({name: mine[name] for name in old}, old) and (is_new or mine.keys() == old.keys())

    return all(is_before(i) or is_at(of(found, i), of(after, i)) for i in {i for i, _ in found})


def outcome(problem, moment, kind, number, before, after):
    """Let one allocation of a step fail; one of `OUTCOMES`."""
    optimizer, error = prepared(problem, moment), None
    try:
        LIBRARY.fail_at(kind, number)
        optimizer.step()
    except Exception as raised:
        error = raised
    let_nothing_fail()
    found = values(optimizer)
    if is_at(found, after):
        return "done" if error is None else "done, raised"
    if error is None or not is_at(found, before):
        return "by parameter" if error is not None and is_whole(found, before, after) else "half"
    optimizer.step()
    return "undone" if is_at(values(optimizer), after) else "broken"


OUTCOMES = ["done", "done, raised", "undone", "by parameter", "half", "broken"]


def in_a_child(*arguments):
    """`outcome` in a process of its own, which may crash."""
    child = os.fork()
    if not child:
        os._exit(OUTCOMES.index(outcome(*arguments)))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return OUTCOMES[code] if 0 <= code < len(OUTCOMES) else f"crashed ({code})"


def main(name, moment, kind, stride):
    faulthandler.enable()
    torch.set_num_threads(1)
    problem, number_of_kind = PROBLEMS[name], KINDS.index(kind)
    prepared(problem, moment).step()  # what is imported and cached is there
    done = prepared(problem, moment)
    before = values(done)
    LIBRARY.fail_at(number_of_kind, 1 << 30)
    done.step()
    n = LIBRARY.allocations()
    let_nothing_fail()
    after = values(done)
    tried = range(n, 0, -int(stride))
    found = {number: in_a_child(problem, moment, number_of_kind, number, before, after) for number in tried}
    print(json.dumps({"allocations": n, "outcomes": Counter(found.values())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
