"""An optimizer's life: whatever users do to it, in whatever order, every step is the step it should be."""

import copy
import functools
import io
import pickle
from collections import Counter

import pytest
import torch
from common import F32, parameters, randn
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from low_precision import BF16
from torch import nn

from .by_hand import Spikes
from .drawn import EMAS, F16, F64, FORMATS, GRADIENTS, GUARDS, PLACES, group, hypers, number, place
from .held import AVERAGE, assert_equal, assert_held, held_by
from .life import Inputs, Life

# Of options that differ from those of a checkpoint, and of formats.
pytestmark = pytest.mark.filterwarnings(
    "ignore:the checkpoint",
    "ignore:the second moments of",
)


def action(**drawn):
    """A rule that is followed by so many steps."""

    def decorate(act):
        @functools.wraps(act)
        def run(self, then_steps, **drawn):
            act(self, **drawn)
            self.values_are_as_expected()
            self.train(then_steps)

        return rule(then_steps=st.integers(0, 2), **drawn)(run)

    return decorate


class Saved:
    """A checkpoint, and what is to be there after it was loaded."""

    def __init__(self, life, state_dict):
        self.state_dict = state_dict
        self.states = [one.state for one in held_by(life.optimizer)]
        self.shapes = [[p.shape for p in g["params"]] for g in life.groups]
        self.dtypes = [p.dtype for p in life.params]
        self.spikes, self.counts = copy.deepcopy(life.spikes), Counter(life.counts)

    def fits(self, life):
        shapes = [[p.shape for p in g["params"]] for g in life.groups]
        return shapes == self.shapes and [p.dtype for p in life.params] == self.dtypes


class LifeOfAnOptimizer(RuleBasedStateMachine):
    """Every rule is something that users do. All but steps and loads leave every value as it was."""

    backend = "native"

    @initialize(
        formats=st.sampled_from([*FORMATS, "plain", "plain"]),
        ema=st.sampled_from(EMAS),
        guard=st.sampled_from(GUARDS),
        max_grad_norm=st.sampled_from([None, 0.5, float("inf")]),
        skip_nonfinite=st.booleans(),
        stats=st.booleans(),
        first=group,
    )
    def begin(self, formats, ema, guard, max_grad_norm, skip_nonfinite, stats, first):
        self.seed, self.saved, self.gradients = 0, [], ["elsewhere"]
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.formats, self.dtypes, is_in_numpy = FORMATS[formats]
        self.has_codes = self.formats.get("state_dtype") == "8bit"
        self.life = Life(
            [self.new_group(first)],
            is_in_numpy,
            ema=ema,
            guard=guard,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            stats=stats,
            backend=self.backend,
            **self.formats,
        )
        self.expect()

    def new_param(self, shape):
        self.seed += 1
        dtype = self.dtypes[self.seed % len(self.dtypes)]
        (p,) = parameters([shape], seed=self.seed, dtype=dtype)
        p.grad_dtype = None  # any
        return p

    def new_group(self, drawn):
        options = dict(drawn["hypers"])
        if self.has_codes:
            options["amsgrad"] = False
        if drawn["variant"]["weight_decay_mode"] in ("schedule", "corrected"):
            options["lr"] = options["lr"] or 1e-2  # the peak that decay is relative to
        if drawn["in_tensor"]:
            options["lr"] = torch.tensor(options["lr"])
        return {**options, **drawn["variant"], "params": [self.new_param(shape) for shape in drawn["shapes"]]}

    def expect(self):
        """Note all values, which are to stay until the next step or load."""
        self.expected = held_by(self.life.optimizer)

    @invariant()
    def values_are_as_expected(self):
        assert_held(held_by(self.life.optimizer), self.expected)

    def param(self, i):
        return self.life.params[i % len(self.life.params)]

    def teardown(self):
        torch.set_num_threads(self.threads)

    # ---- Steps

    def give_gradients(self, scale):
        self.seed += 1
        for i, p in enumerate(self.life.params):
            how = self.gradients[i % len(self.gradients)]
            g = (scale * randn(*p.shape, seed=100 * self.seed + i)).to(p.dtype)
            if how == "absent" or not p.requires_grad:
                p.grad = None
            elif how == "in place":
                p.grad = g if p.grad is None or p.grad.is_neg() or 0 in p.grad.stride() else p.grad.copy_(g)
            else:
                p.grad = GRADIENTS[how](g)

    @action(how=st.lists(st.sampled_from(list(GRADIENTS)), min_size=1, max_size=4))
    def lay_gradients_out_otherwise(self, how):
        self.gradients = how

    @rule(
        times=st.integers(1, 3),
        scale=st.sampled_from([1.0, 1.0, 1.0, 30.0, 1e-3]),
        loss_scale=st.sampled_from([None, None, 8.0]),
        found_inf=st.booleans(),
        loss=st.sampled_from([None, 1.0, 1.5, 100.0, float("nan")]),
    )
    def step(self, times, scale, loss_scale, found_inf, loss):
        for _ in range(times):
            self.give_gradients(scale)
            self.life.step(Inputs(loss_scale, found_inf and loss_scale is not None, loss))
        self.expect()

    def train(self, steps):
        for _ in range(steps):
            self.give_gradients(1.0)
            self.life.step(Inputs())
        self.expect()

    @precondition(lambda self: self.life.spikes or self.life.options["skip_nonfinite"])
    @action(value=st.sampled_from([float("inf"), float("nan")]), i=number)
    def step_on_a_gradient_that_is_not_finite(self, value, i):
        self.give_gradients(1.0)
        if self.param(i).numel() and self.param(i).requires_grad:
            self.param(i).grad = torch.full_like(self.param(i), value)
        self.life.step(Inputs())
        self.expect()

    @action(i=number)
    def step_with_an_error(self, i):
        self.give_gradients(1.0)
        self.param(i).grad = torch.zeros(self.param(i).shape, dtype=self.param(i).dtype).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            self.life.optimizer.step()
        self.param(i).grad = None

    # ---- Parameters and groups

    @precondition(lambda self: len(self.life.groups) < 4)
    @action(drawn=group)
    def add_a_group(self, drawn):
        self.life.add_group(self.new_group(drawn))
        self.expect()

    @action(i=number)
    def freeze_or_unfreeze(self, i):
        self.param(i).requires_grad_(not self.param(i).requires_grad)

    @action(i=number, how=place)
    def swap_data(self, i, how):
        p = self.param(i)
        p.data = PLACES[how](p.data)

    @precondition(lambda self: not self.formats)
    @action(i=number, dtype=st.sampled_from([F32, F64, BF16, F16]))
    def convert_a_parameter(self, i, dtype):
        """As `model.half()` does; the state stays as it is."""
        self.param(i).grad = None
        self.param(i).data = self.param(i).data.to(dtype)
        self.expect()

    @action()
    def flatten_parameters(self):
        """As DDP and others do: into one buffer."""
        for dtype in {p.dtype for p in self.life.params}:
            params = [p for p in self.life.params if p.dtype == dtype]
            flat = torch.cat([p.data.reshape(-1) for p in params])
            for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.data = piece.view(p.shape)

    @action()
    def reverse_the_groups(self):
        self.life.groups.reverse()
        self.life.given.reverse()
        self.expected = held_by(self.life.optimizer)

    @action(i=number)
    def move_a_parameter(self, i):
        """To another group, whose options it then has."""
        params = self.life.groups[i % len(self.life.groups)]["params"]
        if len(params) > 1:
            self.life.groups[0]["params"].append(params.pop(i % len(params)))
            self.expect()

    @precondition(lambda self: len(self.life.groups) > 1)
    @action(i=number)
    def remove_a_group(self, i):
        i %= len(self.life.groups)
        del self.life.given[i]
        for p in self.life.groups.pop(i)["params"]:
            self.life.optimizer.state.pop(p, None)
        self.expect()

    @action(i=number)
    def replace_a_parameter(self, i):
        """By one without state, as pruning does."""
        owner = self.life.groups[i % len(self.life.groups)]
        old = owner["params"][i % len(owner["params"])]
        owner["params"][i % len(owner["params"])] = self.new_param(old.shape)
        self.life.optimizer.state.pop(old, None)
        self.expect()

    @action(i=number)
    def forget_a_state(self, i):
        self.life.optimizer.state.pop(self.param(i), None)
        self.expect()

    # ---- Options

    @action(i=number, drawn=hypers)
    def change_options(self, i, drawn):
        options = self.life.groups[i % len(self.life.groups)]
        lr = options["lr"]
        if isinstance(lr, torch.Tensor):
            drawn = {**drawn, "lr": lr.fill_(drawn["lr"])}
        options.update(drawn, amsgrad=drawn["amsgrad"] and not self.has_codes)

    @action(value=st.sampled_from([None, 0.5, 2.0, float("inf")]))
    def change_the_clip(self, value):
        self.life.optimizer.max_grad_norm = value

    @action(threads=st.integers(1, 2))
    def change_the_number_of_threads(self, threads):
        torch.set_num_threads(threads)

    @action()
    def switch_stats(self):
        self.life.optimizer.stats = not self.life.optimizer.stats

    # ---- State

    def states(self):
        return [self.life.optimizer.state[p] for p in self.life.params if p in self.life.optimizer.state]

    @action(i=number, how=place, in_place=st.booleans())
    def move_state(self, i, how, in_place):
        """Codes lie as their scales say, and may not be laid out otherwise."""
        for state in self.states()[i % 3 :: 2]:
            for key, t in state.items():
                is_coded = key.endswith(("_code", "_scale"))
                new = (torch.clone if is_coded or key == "step" else PLACES[how])(t)
                if in_place:
                    t.data = new
                else:
                    state[key] = new

    @action(forget=st.booleans())
    def offload_and_bring_back(self, forget):
        """In between a step is refused."""
        tensors = [t for state in self.states() for t in state.values() if t.numel()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
        away = [(storage, storage.clone(), storage.nbytes()) for storage in storages]
        for storage, _, _ in away:
            storage.resize_(0)
        if not forget and away:
            self.give_gradients(1.0)
            if any(
                p.grad is not None and p.numel() for p in self.life.params if p in self.life.optimizer.state
            ):
                with pytest.raises(RuntimeError, match="has no memory"):
                    self.life.optimizer.step()
        for storage, copied, size in away:
            storage.resize_(size)
            storage.copy_(copied)

    @action(compact=st.booleans())
    def save(self, compact):
        optimizer = self.life.optimizer
        state_dict = optimizer.state_dict_compact() if compact else optimizer.state_dict()
        self.saved = [*self.saved[-3:], Saved(self.life, copy.deepcopy(state_dict))]

    @precondition(lambda self: any(saved.fits(self.life) for saved in self.saved))
    @action(i=number)
    def load(self, i):
        saved, life = self.fitting(i), self.life
        life.optimizer.load_state_dict(saved.state_dict)
        if life.spikes and saved.spikes:
            self.follow_the_guard(saved)
        self.compare_with(saved)

    @precondition(lambda self: self.life.spikes and any(saved.spikes for saved in self.saved))
    @action(i=number)
    def load_the_guard(self, i):
        """Its history alone, as beside torch.distributed.checkpoint."""
        guarded = [saved for saved in self.saved if saved.spikes]
        saved = guarded[i % len(guarded)]
        self.life.optimizer.load_guard_state_dict(saved.state_dict["guard"])
        self.follow_the_guard(saved)

    def follow_the_guard(self, saved):
        """Go on by hand with what the guard knew at a checkpoint."""
        life = self.life
        life.spikes, life.counts = Spikes(life.options["guard"], saved.spikes), Counter(saved.counts)

    @precondition(lambda self: any(saved.fits(self.life) for saved in self.saved))
    @action(i=number, ema=st.sampled_from(EMAS), guard=st.sampled_from(GUARDS), switch=st.booleans())
    def resume(self, i, ema, guard, switch):
        """From a file, in another optimizer, which may watch and average otherwise."""
        saved, life = self.fitting(i), self.life
        file = io.BytesIO()
        torch.save(saved.state_dict, file)
        file.seek(0)
        state_dict = torch.load(file, weights_only=True)
        life.resume(state_dict, **({"ema": ema, "guard": guard} if switch else {}))
        guard = life.options["guard"]
        life.spikes = guard and Spikes(guard, saved.spikes)
        life.counts = Counter(saved.counts if guard and saved.spikes else ())
        self.compare_with(saved)

    def fitting(self, i):
        fitting = [saved for saved in self.saved if saved.fits(self.life)]
        return fitting[i % len(fitting)]

    def compare_with(self, saved):
        """All of the checkpoint is there, but for averages that are no longer wanted."""
        found = [one.state for one in held_by(self.life.optimizer)]
        for p, mine, state in zip(self.life.params, found, saved.states, strict=True):
            kept = [key for key in state if key != AVERAGE or self.life.options["ema"]]
            assert mine.keys() == set(kept)
            for key in kept:
                assert_equal(mine[key], self.as_loaded(key, state[key], p), key)
        self.expect()

    def as_loaded(self, key, t, p):
        """A part of a state, in the dtype that the optimizer gives it: another one after a conversion."""
        if key == AVERAGE:
            return t.to(F64 if p.dtype == F64 else self.life.options["ema"].dtype or F32)
        return t if self.formats or key == "step" else t.to(p.dtype)

    @precondition(lambda self: not self.formats)
    @action()
    def to_torch_and_back(self):
        """Which casts all of the state, averages too, to the dtypes of parameters."""
        if not {p.dtype for p in self.life.params} <= {F32, F64}:
            return
        optimizer = self.life.optimizer
        groups = [
            {"params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in self.life.groups
        ]
        theirs = torch.optim.AdamW(groups)
        theirs.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(theirs.state_dict())
        for p, one in zip(self.life.params, self.expected, strict=True):
            one.state.update({key: self.as_loaded(key, t, p) for key, t in one.state.items()})

    @action(keep=st.booleans(), how=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copy_all(self, keep, how):
        """One of the two goes on; what happens to the other does not matter to it."""
        life = self.life
        _, optimizer = how((life.params, life.optimizer))
        grads = [p.grad for p in life.params]
        other = life.optimizer if keep else optimizer
        if keep:
            life.optimizer = optimizer
            for p in life.params:
                p.grad_dtype = None
        for p in [p for g in other.param_groups for p in g["params"]]:
            p.grad = torch.ones_like(p)
        other.step()
        for p, g in zip(life.params, grads, strict=True):
            p.grad = g

    @precondition(lambda self: self.life.options["ema"])
    @action()
    def evaluate_with_averages(self):
        optimizer = self.life.optimizer
        with optimizer.swap_ema():
            for p, one in zip(self.life.params, self.expected, strict=True):
                average = one.state.get(AVERAGE, one.p)
                assert_equal(p.detach(), average.to(p.dtype), "parameter during evaluation")
            with pytest.raises(RuntimeError, match="swap_ema"):
                optimizer.step()


def live(machine, examples, actions):
    """Run so many lives of so many actions."""
    options = settings(
        max_examples=examples,
        stateful_step_count=actions,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],  # what is drawn is lived through at once
    )
    run_state_machine_as_test(machine, settings=options)


class OfTheReference(LifeOfAnOptimizer):
    backend = "reference"


machines = pytest.mark.parametrize(
    ("machine", "share"), [(LifeOfAnOptimizer, 0.8), (OfTheReference, 0.2)], ids=["native", "reference"]
)


@machines
def test_300_actions(small_chunks, machine, share):
    live(machine, int(10 * share), 30)


@pytest.mark.slow
@machines
def test_10_000_actions(small_chunks, machine, share):
    live(machine, int(200 * share), 50)
