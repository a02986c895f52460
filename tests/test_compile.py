"""`optimizer.step()` inside torch.compile: parameters still move, and a changing lr recompiles nothing."""

import pytest
import torch
from common import assert_same_path, give_grads, twins
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)


def data(device):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(device)


def train(target, model, compiler, steps=6, **options):
    """Train, with a schedule of lr, a step that `compiler` wraps whole."""
    optimizer = target.adamw(model, max_grad_norm=1.0, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    x = data(target.device)

    def step():
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = compiler(step)
    losses = []
    for _ in range(steps):
        losses.append(step().item())
        scheduler.step()
    return optimizer, losses


def same_as_eager(target, compiler, **options):
    model = small_model(target.device)
    plain = small_model(target.device)
    start = twins(plain.parameters())
    optimizer, losses = train(target, model, compiler, lr=1e-2, **options)
    _, expected = train(target, plain, lambda step: step, lr=1e-2, **options)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    # A compiler may reorder the sums of forward and backward.
    assert_same_path(list(model.parameters()), list(plain.parameters()), 6, grad_error=1e-5)
    return optimizer


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_step(target, backend):
    optimizer = same_as_eager(target, lambda step: torch.compile(step, backend=backend))
    assert all(state["step"].item() == 6 for state in optimizer.state.values())
    assert optimizer.grad_norm.item() > 0


def test_no_recompilation_as_lr_changes(target):
    compiled = CompileCounter()
    frames = []

    def compiler(step):
        run = torch.compile(step, backend=compiled)

        def counted():
            loss = run()
            frames.append(compiled.frame_count)
            return loss

        return counted

    same_as_eager(target, compiler)
    assert frames[0] > 0
    # The second call may see gradients where the first saw None; after it nothing is new.
    assert frames[-1] == frames[1]


def test_compiled_step_alone(target):
    """As in torch's recipe for a compiled optimizer."""
    model = small_model(target.device)
    optimizer = target.adamw(model, lr=1e-2)
    plain = small_model(target.device)
    peer = torch.optim.AdamW(optimizer_groups(optimizer, plain), lr=1e-2, foreach=False)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    for m, o in ((model, step), (plain, peer.step)):
        for _ in range(3):
            m.zero_grad()
            m(data(target.device)).square().mean().backward()
            o()
    assert_same_path(list(model.parameters()), list(plain.parameters()), 3, grad_error=1e-5)


@pytest.mark.parametrize("lr", [1e-2, "tensor"])
def test_compiled_method(target, lr):
    """`torch.compile(optimizer.step)`: called again and again, with a schedule, it compiles nothing anew."""
    model, plain = small_model(target.device), small_model(target.device)
    runs = []
    for m, compiler in (
        (model, lambda step: torch.compile(step, backend="eager")),
        (plain, lambda step: step),
    ):
        optimizer = target.adamw(m, lr=torch.tensor(1e-2) if lr == "tensor" else lr, max_grad_norm=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        runs.append((m, optimizer, scheduler, compiler(optimizer.step)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            for m, _, scheduler, run in runs:
                give_grads(list(m.parameters()), step)
                run()
                scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(state["step"].item() == 4 for state in runs[0][1].state.values())


def optimizer_groups(optimizer, model):
    """The groups of an optimizer, over the parameters of another copy of its model."""
    named = dict(model.named_parameters())
    return [
        {"params": [named[name] for name in group["param_names"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]


def test_loading_a_checkpoint_between_compiled_steps(target):
    model = small_model(target.device)
    optimizer, _ = train(target, model, lambda step: torch.compile(step, backend="eager"), lr=1e-2)
    saved = optimizer.state_dict()
    resumed, _ = train(target, model, lambda step: torch.compile(step, backend="eager"), lr=1e-2, steps=1)
    resumed.load_state_dict(saved)
    x = data(target.device)
    torch.compile(lambda: model(x).sum().backward(), backend="eager")()
    resumed.step()
    assert all(state["step"].item() == 7 for state in resumed.state.values())


@pytest.mark.slow
def test_compiled_by_inductor(target):
    if target.slow:
        pytest.skip("compiling inductor's code and interpreting Triton's do not mix in one process")
    same_as_eager(target, torch.compile)
