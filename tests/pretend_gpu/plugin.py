"""A pytest plugin for runs under the pretend GPU: leaves out what it cannot run, and says why."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

_SPARSE = "sparse tensors: torch's kernels for them have no dense memory that the CPU could compute over"
_DYNAMO = "torch.compile: dynamo does not trace what runs under a dispatch mode"
_NCCL = "collectives on the GPU: NCCL's kernels do not run here"
_OWN_PROGRAM = "programs that nvcc builds: they bring the real runtime"
_LAZY_CLONE = "memory that is shared until it is written to: the pretend GPU's is not of torch's making"
_LEFT_OUT = {
    "test_one_process_on_a_gpu": _NCCL,
    "test_fsdp2_on_a_gpu": _NCCL,
    "test_sparse_gradient": _SPARSE,
    "test_sparse_gradient_after_an_expanded_one": _SPARSE,
    "test_parameters_without_names_are_numbered": _SPARSE,
    "test_sparse_parameter": _SPARSE,
    "test_copies_that_are_made_when_something_is_written": _LAZY_CLONE,
    "test_roundings_on_this_gpu": _OWN_PROGRAM,
    "test_no_recompilation_as_lr_changes": _DYNAMO,
}
_TRITON = "the Triton backend: its kernels are compiled and launched, but compute nothing"
_left_out: Counter[str] = Counter()


def _reason(item: pytest.Item) -> str | None:
    """Why a test cannot run under the pretend GPU; None if it can."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(getattr(value, "backend", value) == "triton" for value in parameters):
        return _TRITON
    return _LEFT_OUT.get(getattr(item, "originalname", item.name))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here."""
    reasons = [_reason(item) for item in items]
    _left_out.update(reason for reason in reasons if reason)
    config.hook.pytest_deselected(items=[i for i, reason in zip(items, reasons, strict=True) if reason])
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was left out."""
    for reason, count in _left_out.items():
        terminalreporter.write_line(f"left out under the pretend GPU, {count} tests: {reason}")


def pytest_testnodedown(node: object, error: object) -> None:
    """Take over what a worker of pytest-xdist left out; all of them collect the same."""
    if found := getattr(node, "workeroutput", {}).get("left_out"):
        _left_out.clear()
        _left_out.update(found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what was left out to the process that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.fixture(autouse=True)
def _faults_are_reported():
    """Wait for the GPU after each test, so that a fault in it fails this test and not a later one."""
    yield
    torch.cuda.synchronize()
