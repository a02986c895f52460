"""Which backend runs, what is logged, what the rest of torch sees of a step, and the operators themselves."""

import logging
import warnings

import pytest
import torch
from common import NATIVE, give_grads, parameters
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_adamw import FusedHygieneAdamW, available_backends, backends
from fused_adamw.backends import native, reference
from fused_adamw.tables import (
    SpikeOptions,
    StepInputs,
    StepInputsStruct,
    chunk_table,
    hyper_table,
    row_table,
    status_words,
    words,
)

STATUS, INPUTS = status_words(0), words(StepInputsStruct)

CPU = torch.device("cpu")


# Choice


def test_available_backends():
    statuses = {(s.backend, s.device): s for s in available_backends()}
    assert set(statuses) == {(b, d) for b in ("native", "triton", "reference") for d in ("cpu", "cuda")}
    assert statuses["native", "cpu"].available
    assert statuses["reference", "cpu"].available
    assert all(s.available == (s.reason is None) for s in statuses.values())
    if not torch.cuda.is_available():
        assert "no CUDA device" in statuses["native", "cuda"].reason


def test_auto_takes_native_then_the_reference(monkeypatch):
    assert backends.kernels_for("auto", CPU) is native
    monkeypatch.setattr(native, "_load_error", lambda: "not built")
    # Never Triton: on the CPU it only interprets.
    assert backends.kernels_for("auto", CPU) is None


def test_a_step_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_load_error", lambda: "not built")
    results = []
    for backend in ("auto", "reference"):
        params = parameters([(5,)])
        optimizer = FusedHygieneAdamW(params, backend=backend)
        give_grads(params, 0)
        optimizer.step()
        results.append(params[0])
    assert torch.equal(*results)


def test_the_chosen_backend_does_the_work(target, monkeypatch):
    calls = []
    for module in (native, reference):
        update = module.update
        monkeypatch.setattr(
            module, "update", lambda *args, u=update, m=module: (calls.append(m.__name__), u(*args))
        )
    params = parameters([(5,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    expected = {"triton": []}.get(target.backend, [f"fused_adamw.backends.{target.backend}"])
    assert calls == expected
    assert optimizer.backend == target.backend


def test_a_gpu_runs_code_for_its_major_version_or_older_ptx():
    archs = "sm_80 sm_90 compute_90"
    served = {c: native._serves(c, archs) for c in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]}
    assert [c for c, ok in served.items() if not ok] == [(7, 5)]
    assert not native._serves((10, 0), "sm_90")
    assert not native._serves((8, 0), "sm_86")
    assert native._serves((9, 0), "sm_90a")
    assert not native._serves((10, 0), "sm_90a compute_90a")
    assert native._serves((10, 3), "sm_100f")
    assert not native._serves((12, 0), "compute_100f")


def test_a_gpu_is_served_by_the_architectures_of_this_build(monkeypatch):
    """As the compiled extension spells them, whatever that is."""
    pytest.importorskip("fused_adamw._C", exc_type=ImportError)
    if not (archs := native.build_info()["cuda_archs"]):
        pytest.skip("the extension was built without CUDA")
    built = [int(arch.split("_")[1].rstrip("af")) for arch in archs.split()]
    gpus = [(*divmod(number, 10), number) for number in built]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, minor, number in [*gpus, (5, 0, 50)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=(major, minor): c)
        reason = native.unavailable_reason(torch.device("cuda"))
        if number in built:
            assert reason is None
        else:
            assert f"built for {archs}, the GPU is sm_{number}" in reason


@pytest.mark.parametrize(
    ("driver", "runtime", "is_served"),
    [
        (12040, "13.0", False),
        (12080, "12.8", True),
        (12020, "12.8", True),
        (13010, "12.8", True),
        (13000, "13.0", True),
    ],
)
def test_a_driver_serves_the_runtimes_of_its_major_version_and_older_ones(
    monkeypatch, driver, runtime, is_served
):
    """The one that is linked into the extension, whatever torch was built with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(native, "_load_error", lambda: None)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_version": runtime, "cuda_archs": "sm_90"})
    reason = native.unavailable_reason(torch.device("cuda"))
    if is_served:
        assert reason is None
    else:
        assert reason.startswith(
            "the extension was built with CUDA 13.0, the driver serves CUDA 12.4: update"
        )


def test_gpus_of_rocm_are_not_taken_for_those_of_cuda(monkeypatch):
    """To torch, both are cuda, and some have the capability of an H100's successor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(native, "_load_error", lambda: None)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_version": "13.0", "cuda_archs": "sm_90"})
    assert "this torch with ROCm" in native.unavailable_reason(torch.device("cuda"))


# Logging


def test_a_model_logs_its_groups(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    with caplog.at_level(logging.INFO, "fused_adamw"):
        FusedHygieneAdamW(model)
    assert [r.getMessage() for r in caplog.records] == ["[AdamW Groups] decay: 1 params, no_decay: 3 params"]
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_bare_parameters_log_that_no_hygiene_was_applied(caplog):
    with caplog.at_level(logging.INFO, "fused_adamw"):
        FusedHygieneAdamW(parameters([(2,), (3,)]), weight_decay=0.25)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(
        "[AdamW Groups] 2 params in one group, weight_decay=0.25 for all: no hygiene applied"
    )
    assert "Pass the model" in line


def test_groups_of_the_user_log_nothing(caplog):
    a, b = parameters([(2,), (3,)])
    with caplog.at_level(logging.INFO, "fused_adamw"):
        FusedHygieneAdamW([{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}])
    assert not caplog.records


# What torch sees of a step


def test_is_a_torch_adamw():
    optimizer = FusedHygieneAdamW(parameters([(2,)]))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert "FusedHygieneAdamW" in repr(optimizer)
    assert "weight_decay: 0.01" in repr(optimizer)


def test_backward_through_an_old_graph_is_refused(target):
    """Torch's fused AdamW does not count as a change of its parameters, and such a gradient is then wrong."""
    w = torch.nn.Parameter(torch.tensor([2.0], device=target.device))
    optimizer = target.adamw([w])
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    version = w._version
    optimizer.step()
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_a_gradient_are_not_marked_as_changed(target):
    params = parameters([(2,), (2,)], device=target.device)
    optimizer = target.adamw(params)
    params[0].grad = torch.ones_like(params[0])
    version = params[1]._version
    optimizer.step()
    assert params[1]._version == version


def test_hooks_fire_once(target):
    """Also after a plain AdamW, whose class torch has then wrapped as well, was built."""
    torch.optim.AdamW(parameters([(2,)]))
    params = parameters([(2,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    try:
        optimizer.step()
    finally:
        everywhere.remove()
    assert calls == ["before", "after", "global"]


def test_state_made_by_a_hook_is_used(target):
    """As frameworks do that choose the dtype of moments themselves."""
    (p,) = parameters([(70,)], device=target.device)
    optimizer = target.adamw([p])

    def fill(optimizer, args, kwargs):
        if not optimizer.state[p]:
            optimizer.state[p] = {
                "step": torch.tensor(0.0, device=p.device),
                "exp_avg": torch.zeros_like(p, dtype=torch.bfloat16),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.bfloat16),
            }

    optimizer.register_step_pre_hook(fill)
    give_grads([p], 0)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("scheduler", [lambda o: StepLR(o, 1), lambda o: OneCycleLR(o, 0.1, total_steps=5)])
def test_schedulers_do_not_warn(scheduler):
    params = parameters([(2,)])
    optimizer = NATIVE.adamw(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = scheduler(optimizer)
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
            schedule.step()


def test_scheduler_called_first_warns_as_with_torch():
    optimizer = NATIVE.adamw(parameters([(2,)]))
    schedule = StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step.* before .*optimizer.step"):
        schedule.step()


def test_zero_grad(target):
    params = parameters([(2,), (3,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_step_in_inference_mode(target):
    (p,) = parameters([(3,)], device=target.device)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = target.adamw([p])
    with torch.no_grad():
        optimizer.step()
    assert not torch.equal(p, before)
    assert p.requires_grad


def test_subclasses_that_change_nothing_are_stepped_by_kernels():
    class Named(torch.Tensor):
        """Adds an attribute, as libraries do."""

    class NamedParameter(torch.nn.Parameter):
        pass

    q = torch.nn.Parameter(torch.ones(3))
    params = [torch.nn.Parameter(torch.ones(3).as_subclass(Named)), NamedParameter(torch.ones(3)), q]
    optimizer = NATIVE.adamw(params)
    for step in range(3):
        for p in params:
            p.grad = torch.full((3,), 2.0 + step)
        optimizer.step()
    assert type(params[0]) is Named
    assert not optimizer._plan.fallbacks
    assert optimizer._plan.check(optimizer.param_groups, optimizer.state) is not None
    assert all(torch.equal(p.detach().as_subclass(torch.Tensor), q.detach()) for p in params)
    assert all(type(t) is torch.Tensor for p in params for t in optimizer.state[p].values())


def test_subclasses_of_their_own_behaviour_are_stepped_by_the_reference():
    """A kernel must not take the address of what is a tensor only by name."""

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    p = torch.nn.Parameter(torch.ones(3).as_subclass(Logged))
    optimizer = NATIVE.adamw([p])
    p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert optimizer._plan.fallbacks == {0: "parameter is a Logged"}


# The operators


def tables(chunk_size=4):
    """The arguments of both operators, for two parameters, and what they point to."""
    params = [torch.ones(6), torch.ones(3)]
    grads = [torch.full((6,), 2.0), torch.full((3,), -1.0)]
    states = [[torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())] for p in params]
    rows = row_table(
        2,
        param=[p.data_ptr() for p in params],
        exp_avg=[m.data_ptr() for m, _, _ in states],
        exp_avg_sq=[v.data_ptr() for _, v, _ in states],
        step=[step.data_ptr() for _, _, step in states],
        numel=[6, 3],
        slot=[0, 1],
    )
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "grad_sign": 1}
    return {
        "rows": rows,
        "grads": torch.tensor([g.data_ptr() for g in grads]),
        "chunks": chunk_table([6, 3], chunk_size),
        "chunk_size": chunk_size,
        "hypers": hyper_table([hyper]),
        "formats": (0, 0, 0, 0, -1),
        "workspace": torch.zeros(4, dtype=torch.float64),
        "sum": torch.zeros(1, dtype=torch.float64),
        "status": torch.zeros(STATUS, dtype=torch.float64),
        "stats": torch.zeros(0, 5, dtype=torch.float64),
    }, (params, grads, states)


def sum_args(t, dtype=0):
    return t["rows"], t["grads"], t["chunks"], t["chunk_size"], dtype, t["workspace"], t["sum"]


def update_args(t, **inputs):
    record = t["inputs"] if "inputs" in t else StepInputs(t["status"], max_grad_norm=1.0, **inputs).record
    tables = t["rows"], t["grads"], t["chunks"], t["chunk_size"], t["hypers"], t["formats"]
    return *tables, record, t["workspace"], t["stats"]


@pytest.fixture
def ops():
    assert native.unavailable_reason(CPU) is None
    return torch.ops.fused_adamw


def test_operators_on_tables(ops):
    t, (params, _, states) = tables()
    ops.sum_of_squares(*sum_args(t))
    assert t["sum"].item() == 6 * 4 + 3
    ops.update(*update_args(t, sums=t["sum"]))
    assert t["status"][0].item() == 27**0.5
    assert all(step.item() == 1 for _, _, step in states)
    torch.testing.assert_close(torch.cat(params), torch.tensor([0.9] * 6 + [1.1] * 3))


def test_opcheck(ops):
    """Schema, fake tensors and functionalisation: that the declared mutation is all there is to see."""
    t, keep = tables()
    torch.library.opcheck(ops.sum_of_squares.default, sum_args(t))
    torch.library.opcheck(ops.update.default, update_args(t))
    t["stats"] = torch.zeros(3, 5, dtype=torch.float64)
    torch.library.opcheck(ops.update.default, update_args(t, sums=t["sum"]))
    del keep


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", torch.zeros(2, 16)),
        ("rows", torch.zeros(2, 15, dtype=torch.int64)),
        ("rows", torch.zeros(32, dtype=torch.int64)),
        ("rows", torch.zeros(16, 2, dtype=torch.int64).t()),
        ("grads", torch.zeros(2)),
        ("grads", torch.zeros(4, dtype=torch.int64)[::2]),
        ("formats", (0, 0)),
        ("formats", (0, 0, 0, 0)),
        ("inputs", torch.zeros(7)),
        ("inputs", torch.zeros(INPUTS - 1, dtype=torch.int64)),
        ("inputs", torch.zeros(2 * INPUTS, dtype=torch.int64)[::2]),
        ("inputs", torch.zeros(INPUTS, dtype=torch.int64)),  # nowhere to report to
        ("chunks", torch.zeros(3, 2, dtype=torch.int64)),
        ("chunks", torch.zeros(3, 3, dtype=torch.int32)),
        ("hypers", torch.zeros(1, 7)),
        ("hypers", torch.zeros(1, 7, dtype=torch.float64)),
        ("workspace", torch.zeros(4)),
        ("workspace", torch.zeros(0, dtype=torch.float64)),
        ("stats", torch.zeros(3, 5)),
        ("stats", torch.zeros(3, 4, dtype=torch.float64)),
        ("stats", torch.zeros(2, 5, dtype=torch.float64)),
        ("sum", torch.zeros(1)),
        ("sum", torch.zeros(0, dtype=torch.float64)),
        ("chunk_size", 0),
        ("chunk_size", -4),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_malformed_tables_are_refused(ops, name, value):
    t, (params, _, _) = tables()
    t[name] = value
    if name == "sum":
        with pytest.raises(RuntimeError, match=f"fused_adamw: {name}"):
            ops.sum_of_squares(*sum_args(t))
        return
    with pytest.raises(RuntimeError, match=f"fused_adamw: {name}"):
        ops.update(*update_args(t))
    assert params[0].eq(1).all()


def test_a_workspace_without_a_place_for_every_chunk_is_refused(ops):
    t, _ = tables()
    t["workspace"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"workspace must be .* with at least 4 elements"):
        ops.sum_of_squares(*sum_args(t))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_scale", torch.zeros((), dtype=torch.float64)),
        ("grad_scale", torch.zeros((), device="meta")),
        ("found_inf", torch.zeros(0)),
        ("sums", torch.zeros(1)),
        ("sums", torch.zeros(4, dtype=torch.float64)[::2]),
        ("status", torch.zeros(STATUS)),
        ("status", torch.zeros(STATUS - 1, dtype=torch.float64)),
        ("loss", torch.zeros(())),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_inputs_of_another_kind_are_refused(name, value):
    """They reach kernels as addresses, which say nothing of what is there."""
    inputs = StepInputs(**{"status": torch.zeros(STATUS, dtype=torch.float64), name: value})
    with pytest.raises(ValueError, match=f"{name} must be contiguous, of torch.float"):
        inputs.record  # noqa: B018


def test_a_status_without_room_for_the_history_is_refused():
    inputs = StepInputs(torch.zeros(STATUS, dtype=torch.float64), spikes=SpikeOptions(6.0, 8, 8))
    with pytest.raises(ValueError, match=f"status must be .* at least {STATUS + 9 + 2 * (2 + 8)} elements"):
        inputs.record  # noqa: B018


def test_dtypes_without_a_kernel_are_refused(ops):
    t, (params, _, states) = tables()
    with pytest.raises(RuntimeError, match="no update kernel for formats 0, 3, 0, 0, -1"):
        ops.update(*update_args({**t, "formats": (0, 3, 0, 0, -1)}))
    with pytest.raises(RuntimeError, match="no update kernel for formats 0, 0, 0, 0, 1"):
        ops.update(*update_args({**t, "formats": (0, 0, 0, 0, 1)}))
    with pytest.raises(RuntimeError, match="no norm kernel for gradient format 9"):
        ops.sum_of_squares(*sum_args(t, 9))
    assert params[0].eq(1).all()
    assert all(step.item() == 0 for _, _, step in states)


def test_tables_without_rows(ops):
    t, _ = tables()
    t["rows"], t["chunks"] = t["rows"][:0], t["chunks"][:0]
    t["sum"].fill_(5.0)
    ops.sum_of_squares(*sum_args(t))
    ops.update(*update_args(t, sums=t["sum"]))
    assert t["sum"].item() == t["status"][0].item() == 0.0
