"""Bad input: a message that says what and where, before anything has changed."""

import math
import re

import numpy as np
import pytest
import torch
from common import NATIVE, give_grads, parameters, snapshot, unchanged_since

from fused_adamw import FusedHygieneAdamW, backends


def two_params(target, **options):
    """A named pair with state, and gradients for the next step."""
    params = parameters([(3, 3), (3, 3)], device=target.device)
    optimizer = target.adamw(list(zip(["first", "second"], params, strict=True)), **options)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", None, "invalid lr in parameter group 1: None, expected a number"),
        ("eps", "small", "invalid eps in parameter group 1: 'small', expected a number"),
        ("lr", "1e-3", r"invalid lr in parameter group 1: '1e-3'.*: pass float\('1e-3'\). YAML reads"),
        (
            "weight_decay",
            np.str_("0.1"),
            r"invalid weight_decay in parameter group 1: .*0.1.*pass float\('0.1'\)",
        ),
        ("betas", "98", r"invalid betas\[0\] in parameter group 1: '9', expected a number"),
        ("betas", (0.9, b"0.99"), r"invalid betas\[1\] in parameter group 1: b'0.99', expected a number"),
        ("weight_decay", torch.ones(2), r"invalid weight_decay in parameter group 1: tensor\(.*expected a n"),
        ("betas", (0.9,), r"invalid betas in parameter group 1: \(0.9,\), expected two numbers"),
        ("betas", 0.9, "invalid betas in parameter group 1: 0.9, expected two numbers"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_hyper_parameter_of_another_kind_set_by_hand(target, key, value, message, steps_before):
    params = parameters([(3, 3), (3, 3)], device=target.device)
    optimizer = target.adamw([{"params": [p]} for p in params], max_grad_norm=1.0)
    for step in range(steps_before):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 9)
    optimizer.param_groups[1][key] = value
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert unchanged_since(optimizer, before)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_sparse_gradient(target, steps_before):
    params = parameters([(3, 3), (3, 3)], device=target.device)
    optimizer = target.adamw(list(zip(["first", "second"], params, strict=True)), max_grad_norm=1.0)
    for step in range(steps_before):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 9)
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients.*SparseAdam.*'second'"):
        optimizer.step()
    assert unchanged_since(optimizer, before)


def test_sparse_gradient_after_an_expanded_one(target):
    (p,) = parameters([(3, 3)], device=target.device)
    optimizer = target.adamw([p])
    p.grad = torch.ones(1, device=target.device).expand(3, 3)
    optimizer.step()
    p.grad = torch.eye(3, device=target.device).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize(
    "moment",
    [torch.zeros(9), torch.zeros(3, 4), torch.zeros(3, 3, device="meta")],
    ids=["1-dim", "larger", "elsewhere"],
)
def test_moment_of_another_shape_or_device(target, key, moment):
    """A model that was moved or resized: named, and the parameter before it is not stepped either."""
    optimizer, params = two_params(target, amsgrad=True, max_grad_norm=1.0)
    before = snapshot(optimizer)
    kept = optimizer.state[params[1]][key]
    optimizer.state[params[1]][key] = moment.to(params[1].device) if not moment.is_meta else moment
    wrong = f"{key} of parameter 'second' is .*expected .* like the parameter"
    with pytest.raises(RuntimeError, match=wrong):
        optimizer.step()
    optimizer.state[params[1]][key] = kept
    assert unchanged_since(optimizer, before)
    optimizer.step()


@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "step"])
def test_memory_that_was_taken_away(target, what):
    """As by offloading: refused, where torch's for-loop would crash."""
    optimizer, params = two_params(target)
    before = snapshot(optimizer)
    p = params[1]
    t = {"parameter": p, "gradient": p.grad, **optimizer.state[p]}[what]
    kept = t.detach().clone()
    t.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{what}.* 'second' has no memory"):
        optimizer.step()
    t.untyped_storage().resize_(kept.nbytes)
    t.detach().copy_(kept)
    assert unchanged_since(optimizer, before)
    optimizer.step()


def test_parameter_replaced_by_a_smaller_one(target):
    optimizer, params = two_params(target)
    params[1].data = torch.ones(2, 2, device=target.device)
    params[1].grad = torch.ones(2, 2, device=target.device)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 'second' is \(3, 3\).* expected \(2, 2\)"):
        optimizer.step()


def test_parameters_without_names_are_numbered(target):
    params = parameters([(3,), (3,), (3,)], device=target.device)
    optimizer = target.adamw([{"params": params[:1]}, {"params": params[1:]}])
    give_grads(params, 0)
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match="number 1 of group 1"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_parameter_that_is_not_a_number_on_a_line(dtype):
    p = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=f"parameter ids of group 0 has dtype {dtype}"):
        FusedHygieneAdamW([("weight", torch.zeros(2)), ("ids", p)])


BAD_HYPERS = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": math.inf},
    {"lr": torch.tensor(-1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (math.nan, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, -1.0)},
    {"betas": (0.9, math.nan)},
    {"eps": -1e-8},
    {"eps": math.nan},
    {"weight_decay": -0.1},
    {"weight_decay": math.nan},
    {"weight_decay": math.inf},
]


@pytest.mark.parametrize("hypers", BAD_HYPERS, ids=str)
def test_hyper_parameter_out_of_range(hypers):
    (value,) = hypers.values()
    number = f"{float(next(x for x in value if not 0 <= x < 1) if isinstance(value, tuple) else value):g}"
    for params in (parameters([(2,)]), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=rf"(?i)(invalid|expected).*{re.escape(number)}"):
            FusedHygieneAdamW(params, **hypers)


@pytest.mark.parametrize("hypers", BAD_HYPERS, ids=str)
def test_hyper_parameter_of_a_group_out_of_range(hypers):
    """Torch checks its defaults alone."""
    (name,) = hypers
    name = {"betas": r"betas\[[01]\]"}.get(name, name)
    p, q = parameters([(2,), (2,)])
    with pytest.raises(ValueError, match=f"invalid {name} in parameter group 1: .*expected"):
        FusedHygieneAdamW([{"params": [p]}, {"params": [q], **hypers}])


@pytest.mark.parametrize(
    "make",
    [
        lambda old, new: {"params": [new], "lr": -1.0},
        lambda old, new: {"params": [new, torch.zeros(2, dtype=torch.int32)]},
        lambda old, new: {"params": [torch.zeros(2, device="meta")]},
        lambda old, new: {"params": [new, old]},
    ],
    ids=["lr", "dtype", "device", "in another group"],
)
def test_refused_group_is_not_added(make):
    old, new = parameters([(2,), (2,)])
    optimizer = NATIVE.adamw([old])
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.add_param_group(make(old, new))
    assert optimizer.param_groups == groups
    optimizer.add_param_group({"params": [new]})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1.0, ValueError, "max_grad_norm must be None or a number > 0, got -1"),
        (math.nan, ValueError, "got nan"),
        (-math.inf, ValueError, "got -inf"),
        (0, ValueError, "got 0, which would scale every gradient to zero: pass None to switch clipping off"),
        (0.0, ValueError, "pass None"),
        (torch.tensor(0.0), ValueError, "pass None"),
        ("1.0", TypeError, "max_grad_norm must be None or a number, got '1.0'"),
        (True, TypeError, "got True"),
        (torch.ones(2), TypeError, "got tensor"),
        ([1.0], TypeError, "got .1.0."),
    ],
    ids=str,
)
def test_max_grad_norm_that_is_none(value, error, message):
    params = parameters([(2,)])
    with pytest.raises(error, match=message):
        FusedHygieneAdamW(params, max_grad_norm=value)
    optimizer = FusedHygieneAdamW(params, max_grad_norm=2.0)
    with pytest.raises(error, match=message):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == optimizer.defaults["max_grad_norm"] == 2.0


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float32(1), np.float64(1), np.int64(1), torch.tensor(1.0)], ids=repr
)
def test_max_grad_norm_of_any_kind_of_number(value):
    assert FusedHygieneAdamW(parameters([(2,)]), max_grad_norm=value).max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1e-3"}, r"lr must be a number, got the string '1e-3': pass float\('1e-3'\)"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, got the string '0.1'"),
        ({"betas": ("0.9", 0.999)}, r"betas\[0\] must be a number, got the string"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"eps": None}, "eps must be a number, got None"),
    ],
    ids=str,
)
def test_hyper_parameter_that_is_no_number(options, message):
    """Torch fails on comparing it with 0, and does not say which one it is."""
    for params in (parameters([(2,)]), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=message):
            FusedHygieneAdamW(params, **options)
    (name,) = options
    with pytest.raises(TypeError, match=f"invalid {name}"):
        FusedHygieneAdamW([{"params": parameters([(2,)]), **options}])


def test_sparse_parameter(target):
    """Named as such: it is not its gradient that is wrong. Without a gradient it is nobody's business."""
    sparse = torch.nn.Parameter(torch.eye(3, device=target.device).to_sparse())
    params = [*parameters([(2,)], device=target.device), sparse]
    optimizer = target.adamw(list(zip(["dense", "graph"], params, strict=True)))
    give_grads(params[:1], 0)
    optimizer.step()
    before = snapshot(optimizer)
    sparse.grad = torch.eye(3, device=target.device).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 'graph' is itself sparse, of layout torch\.sparse"):
        optimizer.step()
    assert torch.equal(params[0], before[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_fused_asks_of_parameters_what_it_asks_in_torch(dtype):
    device = "meta" if dtype == torch.float32 else "cpu"
    messages = []
    for make in (FusedHygieneAdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(2, dtype=dtype, device=device))
        optimizer = make([p], fused=True)
        p.grad = torch.ones_like(p)
        with pytest.raises(
            RuntimeError, match="`fused=True` requires all the params to be floating"
        ) as error:
            optimizer.step()
        messages.append(str(error.value))
        assert make([p]).step() is None
    assert messages[0] == f"parameter number 0 of group 0: {messages[1]}"


@pytest.mark.parametrize("value", [torch.float16, torch.int32, "float32"])
def test_state_dtype_of_another_kind(value):
    with pytest.raises(
        ValueError, match=r"state_dtype must be None, torch.float32, torch.bfloat16 or '8bit', got"
    ):
        FusedHygieneAdamW(parameters([(2,)]), state_dtype=value)


@pytest.mark.parametrize("value", [None, "no", 2])
def test_skip_nonfinite_is_yes_or_no(value):
    with pytest.raises(ValueError, match="skip_nonfinite must be True or False, got"):
        FusedHygieneAdamW(parameters([(2,)]), skip_nonfinite=value)


def test_unknown_backend():
    known = "'auto', 'native', 'triton', 'reference'"
    with pytest.raises(ValueError, match=f"unknown backend 'cuda': expected one of {known}"):
        FusedHygieneAdamW(parameters([(2,)]), backend="cuda")


def test_unavailable_backend_says_why_and_what_is_available(monkeypatch):
    monkeypatch.setattr(backends.native, "_load_error", lambda: "the extension is not built")
    wrong = "'native' cannot run on cpu: the extension is not built.* Available: .*reference"
    with pytest.raises(RuntimeError, match=wrong):
        FusedHygieneAdamW(parameters([(2,)]), backend="native")


def test_backend_without_kernels_for_a_device():
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match="'native' cannot run on meta: no kernels for meta devices"):
        FusedHygieneAdamW([p], backend="native")


def test_nothing_to_train():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        FusedHygieneAdamW(torch.nn.ReLU())
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"all 2 parameters of Linear are frozen.*'weight'"):
        FusedHygieneAdamW(frozen)
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedHygieneAdamW([])


def test_differentiable():
    with pytest.raises(RuntimeError, match=r"does not support `differentiable`.*torch.optim.AdamW"):
        FusedHygieneAdamW(parameters([(2,)]), differentiable=True)


def test_what_torch_refuses():
    (p,) = parameters([(2,)])
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        FusedHygieneAdamW([p], foreach=True, fused=True)
    with pytest.raises(TypeError, match="should be an iterable"):
        FusedHygieneAdamW(p)
    with pytest.raises(ValueError, match="non-leaf"):
        FusedHygieneAdamW([p * 2])
    with pytest.raises(ValueError, match="1-element"):
        FusedHygieneAdamW([p], lr=torch.tensor([1.0, 2.0]))


def test_message_of_an_infinite_lr_says_finite():
    with pytest.raises(ValueError, match="expected a finite number"):
        FusedHygieneAdamW(parameters([(2,)]), lr=math.inf)
