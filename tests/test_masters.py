"""Masters of bfloat16 parameters: float32 in two halves, and the weights that come and go."""

import copy

import pytest
import torch
from common import parameters, twins, unchanged_since
from common import snapshot as copies_of
from low_precision import (
    BF16,
    F32,
    SCHEMES,
    SHAPES,
    SPLIT,
    assert_in_kernels,
    assert_masters,
    assert_same_state,
    masters_of,
    model,
    run,
    same_bits,
)


def test_split_is_float32_with_a_rounded_copy(target):
    """Bit for bit, whatever the moments are kept in."""
    for name, steps in (("split", 200), ("split-bfloat16", 20), ("split-8bit", 20)):
        steps, options = min(steps, 20) if target.slow else steps, SCHEMES[name]
        params, optimizer = model(target, **options)
        masters = masters_of(params)
        peer = target.adamw(masters, lr=1e-2, max_grad_norm=1.0, **{**options, "master_weights": None})
        run(params, optimizer, steps)
        run(masters, peer, steps)
        assert_in_kernels(target, optimizer)
        assert_masters(params, optimizer, masters)


def test_a_weight_that_is_zeroed_by_hand_stays_zero(target):
    """Its residual would else make it a tiny number again."""
    p = parameters([(40, 130)], dtype=BF16, device=target.device)[0]
    optimizer = target.adamw([p], master_weights="split", state_dtype=F32)
    run([p], optimizer, 3)
    mask = optimizer.state[p]["master_residual"] < 0
    assert mask.any()
    with torch.no_grad():
        p[mask] = 0
        p[0, 0] = -0.0
        p.grad.zero_()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key][mask] = 0
    optimizer.step()
    assert (p[mask] == 0).all()


def test_weights_that_are_loaded_later_survive(target):
    """What is left of the old master is half a unit in the last place; `resync_master` drops it."""
    params, optimizer = model(target, master_weights="split", state_dtype=F32)
    run(params, optimizer, 3)
    new = [torch.nn.Parameter(p.detach().clone()) for p in parameters(SHAPES, seed=5, dtype=BF16)]
    with torch.no_grad():
        for p, q in zip(params, new, strict=True):
            p.copy_(q)
    loaded = optimizer.master_state_dict(torch.nn.ParameterList(params))
    for i, p in enumerate(params):
        assert (loaded[str(i)] - p.float()).abs().le(2.0**-8 * p.detach().float().abs()).all()
    optimizer.resync_master()
    loaded = optimizer.master_state_dict(torch.nn.ParameterList(params))
    assert all(same_bits(loaded[str(i)], p.detach().float()) for i, p in enumerate(params))
    assert all(p.equal(q.to(p.device)) for p, q in zip(params, new, strict=True))


class Net(torch.nn.Module):
    """With a tied weight, a buffer, and a weight in float32."""

    def __init__(self, dtype=BF16):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 90)
        self.body = torch.nn.Linear(90, 90)
        self.norm = torch.nn.BatchNorm1d(90)
        self.head = torch.nn.Linear(90, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)
        self.norm.float()


def test_masters_are_taken_from_a_float32_model_and_given_back(target):
    torch.manual_seed(0)
    full = Net(F32).to(target.device)
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split", state_dtype=F32, max_grad_norm=1.0)
    expected = {key: value.clone() for key, value in full.state_dict().items()}
    net.load_state_dict(expected)
    optimizer.load_master(expected)
    for name, p in net.named_parameters():
        if p.dtype == BF16:
            assert same_bits(p.detach(), SPLIT.store(expected[name], None, p)[0])
    found = optimizer.master_state_dict(net)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert same_bits(value, expected[key]), key
    assert found["head.weight"] is found["embedding.weight"]
    peer = target.adamw(full, state_dtype=F32, max_grad_norm=1.0)
    for step in range(3):
        for model_, each in ((net, optimizer), (full, peer)):
            run(list(model_.parameters()), each, 1, first=step)
    assert_in_kernels(target, optimizer)
    found = optimizer.master_state_dict(net)
    assert all(same_bits(found[name], p.detach()) for name, p in full.named_parameters())


def test_masters_are_found_under_any_name_of_a_tied_weight(target):
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split")
    weights = {key: value.float() for key, value in net.state_dict().items()}
    del weights["embedding.weight"]
    weights["head.weight"] += 1e-4
    optimizer.load_master(weights)
    assert same_bits(optimizer.master_state_dict(net)["head.weight"], weights["head.weight"])


def test_masters_that_do_not_fit_are_refused_before_anything_changes(target):
    net = Net().to(target.device)
    optimizer = target.adamw(net, master_weights="split")
    weights = {key: value.float() + 1 for key, value in net.state_dict().items()}
    before = copies_of(optimizer)
    missing = {key: value for key, value in weights.items() if key != "body.bias"}
    with pytest.raises(ValueError, match=r"'body.bias' is not in the state_dict: .* under body.bias"):
        optimizer.load_master(missing)
    with pytest.raises(RuntimeError, match=r"'body.bias' is \(3,\), expected \(90,\)"):
        optimizer.load_master({**weights, "body.bias": torch.zeros(3)})
    assert unchanged_since(optimizer, before)
    with pytest.raises(ValueError, match="no masters"):
        target.adamw(net).load_master(weights)
    run(list(net.parameters()), optimizer, 1)
    with pytest.raises(ValueError, match=r"'embedding.weight' is not in the model's state_dict"):
        optimizer.master_state_dict(net.body)


# ---- Checkpoints


def test_residuals_without_a_master_are_dropped_with_a_warning(target):
    params, optimizer = model(target, master_weights="split")
    run(params, optimizer, 2)
    plain = target.adamw(twins(params))
    with pytest.warns(UserWarning, match="has masters of 5 parameters, .* 0 .* among them"):
        plain.load_state_dict(optimizer.state_dict())
    assert all("master_residual" not in state for state in plain.state.values())
    run(plain.param_groups[0]["params"], plain, 1)


def test_a_checkpoint_without_residuals_starts_from_the_parameters(target):
    params, optimizer = model(target, master_weights="split", state_dtype=F32)
    run(params, optimizer, 2)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("master_residual")
    optimizer.load_state_dict(saved)
    masters = masters_of(params)
    peer = target.adamw(masters, lr=1e-2, max_grad_norm=1.0, state_dtype=F32)
    peer.load_state_dict(saved)
    run(params, optimizer, 3, first=2)
    run(masters, peer, 3, first=2)
    assert_in_kernels(target, optimizer)
    assert_masters(params, optimizer, masters)


@pytest.mark.parametrize("weights_by", ["torch", "safetensors"])
@pytest.mark.parametrize("compact", [False, True])
def test_files_restore_every_bit(target, tmp_path, weights_by, compact):
    """The model's file beside the optimizer's, of which neither runs code when it is loaded."""
    options = SCHEMES["split-8bit"]
    net = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.LayerNorm(64)).to(target.device, BF16)
    optimizer = target.adamw(net, max_grad_norm=1.0, **options)
    run(list(net.parameters()), optimizer, 3)
    state = optimizer.state_dict_compact() if compact else optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    if weights_by == "torch":
        torch.save(net.state_dict(), tmp_path / "model.pt")
        weights = torch.load(tmp_path / "model.pt", weights_only=True)
    else:
        files = pytest.importorskip("safetensors.torch")
        files.save_file(net.state_dict(), tmp_path / "model.safetensors")
        weights = files.load_file(tmp_path / "model.safetensors")
    resumed = target.adamw(other, max_grad_norm=1.0, **options)
    other.load_state_dict(weights)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert_same_state(optimizer, resumed)
    run(list(net.parameters()), optimizer, 2, first=3)
    run(list(other.parameters()), resumed, 2, first=3)
    assert_same_state(optimizer, resumed)
