"""docs/scaling.md: its formulas are those of docs/scaling.py, and agree with each other."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.peers import PASSES
from benchmarks.provenance import ROOT
from benchmarks.report.__main__ import scaling as load

scaling = load()
PAGE = ROOT / "docs" / "scaling.md"


def test_the_page_names_the_session_that_it_takes_a_time_from():
    assert f"`{scaling.HOST_SESSION.relative_to(ROOT)}`" in PAGE.read_text()
    assert scaling.HOST_SESSION.exists()


@pytest.mark.parametrize(("storage", "size"), [(scaling.FP32, 4), (scaling.BF16, 2)])
def test_bytes_are_those_of_the_benchmarks(storage, size):
    clipped, alone = PASSES["ours"]
    assert storage.moved(clip=True) == clipped * size
    assert storage.moved(clip=False) == alone * size


def test_mixed_storage_moves_what_each_tensor_weighs():
    storage = scaling.Storage("", parameter=1, gradient=10, moment=100)
    assert storage.held == 211
    assert storage.moved(clip=False) == (1 + 10 + 100 + 100) + (1 + 100 + 100)
    assert storage.moved(clip=True) - storage.moved(clip=False) == 10


@pytest.mark.parametrize(
    ("ranks", "microseconds"), [(1, 0.0), (2, 8.0), (8, 15.2), (16, 25.2), (512, 75.2), (16384, 125.2)]
)
def test_the_all_reduce_goes_up_and_down_the_tree(ranks, microseconds):
    assert scaling.all_reduce_seconds(ranks) * 1e6 == pytest.approx(microseconds)


@pytest.mark.parametrize("ranks", scaling.RANKS)
@pytest.mark.parametrize("storage", scaling.STORAGES, ids=lambda storage: storage.name)
def test_memory_and_message_take_equally_long_at_the_crossover(ranks, storage):
    parameters = scaling.crossover_parameters(ranks, storage)
    memory = scaling.memory_seconds(parameters, ranks, storage)
    assert memory == pytest.approx(scaling.all_reduce_seconds(ranks))


@pytest.mark.parametrize("model", scaling.MODELS, ids=lambda model: model.name)
def test_more_gpus_meet_the_limit_of_the_host_before_that_of_the_message(model):
    measured = scaling.host_seconds_per_tensor() * model.tensors
    for host in (scaling.host_target_seconds(model.tensors), measured):
        ranks = scaling.host_crossover_ranks(model, host)
        assert scaling.memory_seconds(model.parameters, ranks) == pytest.approx(host)
        assert host > scaling.all_reduce_seconds(2 ** int(ranks).bit_length())


def test_the_share_of_training_is_the_quotient_of_the_times():
    model, ranks, tokens = scaling.MODELS[3], 16384, 2**24
    training = 6 * model.parameters * tokens / (ranks * scaling.FLOPS)
    share = scaling.memory_seconds(model.parameters, ranks) / training
    assert scaling.share_of_training(tokens) == pytest.approx(share)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (12.3, "12 s"),
        (1.0, "1 s"),
        (0.0417, "42 ms"),
        (1.04e-3, "1 ms"),
        (129.4e-6, "129 µs"),
        (5.04e-7, "0.5 µs"),
    ],
)
def test_durations_are_written_with_their_unit(seconds, words):
    assert scaling.duration(seconds) == words


def test_the_picture_is_drawn(tmp_path):
    scaling.draw(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
