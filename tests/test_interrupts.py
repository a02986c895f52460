"""An interrupt, wherever it strikes: a step has either changed everything that it changes, or nothing."""

import _thread
import random
import signal
import sys
import threading
import time

import pytest
import torch
from common import NATIVE, Target, parameters, randn
from torch import nn

REFERENCE = Target("reference", "cpu")


@pytest.fixture(autouse=True)
def ctrl_c():
    """Interrupts, also where tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def grad_mode():
    """torch.no_grad() that is interrupted on its way out leaves gradients off, in any program."""
    yield
    torch.set_grad_enabled(True)


def one_launch():
    return NATIVE, parameters([(3, 4), (5,), ()])


def two_launches():
    """The first half may not be stepped without the second."""
    return NATIVE, [*parameters([(3, 4), (5,)]), *parameters([(4,), (2,)], dtype=torch.float64)]


def kernels_and_reference():
    return NATIVE, [nn.Parameter(torch.ones(8)[::2]), *parameters([(3, 4), (5,)])]


def reference():
    return REFERENCE, parameters([(3, 4), (5,)])


class Problem:
    """An optimizer before a step, which it can be taken back to.

    Args:
        make: Gives the backend and the parameters.
        steps: Made so far.
    """

    def __init__(self, make, steps):
        target, self.params = make()
        self.optimizer = target.adamw(self.params, lr=0.1, max_grad_norm=1.0, amsgrad=True)
        for _ in range(steps):
            self.step()
        self.give_grads()
        self.before = self.values()

    def give_grads(self):
        for i, p in enumerate(self.params):
            p.grad = randn(*p.shape, seed=i, dtype=p.dtype)

    def step(self):
        self.give_grads()
        self.optimizer.step()

    def values(self):
        """Copies of all that a step changes, by parameter and name."""
        state = {
            (i, name): value.clone()
            for i, p in enumerate(self.params)
            for name, value in self.optimizer.state.get(p, {}).items()
        }
        return state | {(i, "parameter"): p.detach().clone() for i, p in enumerate(self.params)}

    @property
    def count(self):
        return self.optimizer.state[self.params[0]]["step"].item()

    def is_at(self, values):
        mine = self.values()
        return mine.keys() == values.keys() and all(torch.equal(mine[key], values[key]) for key in mine)

    def go_back(self):
        """To before the step; only where it made no state."""
        with torch.no_grad():
            for (i, name), value in self.before.items():
                p = self.params[i]
                (p if name == "parameter" else self.optimizer.state[p][name]).copy_(value)


class AtOpcode:
    """Traces a call, and interrupts it before one of its bytecodes, as Ctrl-C does.

    Args:
        number: Of the bytecode, in order of execution; None: interrupt nothing.

    Attributes:
        count: Bytecodes seen.
    """

    def __init__(self, number=None):
        self.number, self.count = number, 0

    def __call__(self, frame, event, arg):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count == self.number:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, call):
        """Whether the call was interrupted."""
        before = sys.gettrace()  # a coverage tool's
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def outcomes(make, steps, stride, offset=1):
    """Interrupt a step at one bytecode after another; the outcomes that there were."""
    done, counter = Problem(make, steps), AtOpcode()
    counter.run(done.optimizer.step)
    after = done.values()
    assert not done.is_at(done.before)
    problem, seen = Problem(make, steps), set()
    for number in range(offset, counter.count + 1, stride):
        if steps:
            problem.go_back()
        else:
            problem = Problem(make, steps)
        AtOpcode(number).run(problem.optimizer.step)
        is_before, is_after = problem.is_at(problem.before), problem.is_at(after)
        assert is_before or is_after, f"half a step, interrupted at bytecode {number} of {counter.count}"
        seen.add("after" if is_after else "before")
        if is_before:
            problem.optimizer.step()
            assert problem.is_at(after), f"another step after an interrupt at bytecode {number}"
    return seen


MAKERS = pytest.mark.parametrize("make", [one_launch, two_launches, kernels_and_reference, reference])


@pytest.mark.parametrize(
    ("steps", "stride"),
    [
        pytest.param(0, 499, id="first"),
        pytest.param(2, 13, id="later"),
        pytest.param(0, 41, id="first, often", marks=pytest.mark.slow),
        pytest.param(2, 1, id="later, at each", marks=pytest.mark.slow),
    ],
)
@MAKERS
def test_at_a_bytecode(make, steps, stride):
    assert outcomes(make, steps, stride, offset=1 + stride // 2) == {"before", "after"}


def test_a_warning_turned_into_an_error_leaves_the_handler_as_it_was():
    before = signal.getsignal(signal.SIGINT)
    problem = Problem(reference, 2)

    def refuse(_):
        raise ArithmeticError

    problem.optimizer._double_clip.observe = refuse
    with pytest.raises(ArithmeticError):
        problem.optimizer.step()
    assert problem.is_at(problem.before)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_handlers_of_any_kind_stay(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        Problem(reference, 1).step()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@MAKERS
def test_by_another_thread(make):
    """500 times each, whenever it comes: as many steps are whole as the counts say."""
    problem, twin, pause = Problem(make, 2), Problem(make, 2), random.Random(0)
    for interrupt in range(500):
        timer = threading.Thread(
            target=lambda: (time.sleep(pause.uniform(0.0, 2e-3)), _thread.interrupt_main())
        )
        try:
            timer.start()
            deadline = time.monotonic() + 60.0
            while time.monotonic() < deadline:
                problem.optimizer.step()
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("an interrupt was lost")
        timer.join()
        while twin.count < problem.count:
            twin.optimizer.step()
        assert problem.is_at(twin.values()), f"half a step, at interrupt {interrupt}"
