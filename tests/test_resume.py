from dataclasses import replace

import pytest
import torch

from unbackdoor.cbd import EpochLosses, PurifyState
from unbackdoor.errors import OutputError, StateError
from unbackdoor.resume import (
    find_state,
    go_on,
    identity,
    load_state,
    save_state,
    write_state,
)
from unbackdoor.settings import PurifySettings, ViewSettings


@pytest.fixture
def state(generator):
    weights = {"a.weight": torch.randn(3, 2, generator=generator), "n": torch.tensor(7)}
    history = (EpochLosses(1.1, 2.2, 0.1, 1.0, seconds=3.5),)
    return PurifyState(history, weights, {"a.weight": torch.randn(3, 2, generator=generator)})


def of(settings=PurifySettings(), **changed):
    return identity(settings, **{"checkpoint": "c", "images": "i", **changed})


def test_a_state_survives_the_disk_bit_for_bit(state, tmp_path):
    save_state(tmp_path / "s.safetensors", state, of())
    read = load_state(tmp_path / "s.safetensors", of())
    assert read.history == state.history
    torch.testing.assert_close(read.student, state.student, rtol=0, atol=0)
    torch.testing.assert_close(read.momentum, state.momentum, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (of(checkpoint="d"), "checkpoint was c, now d"),
        (of(images="j"), "images was i, now j"),
        (of(replace(PurifySettings(), seed=1)), "seed was 0, now 1"),
        (of(replace(PurifySettings(), views=ViewSettings(grey=0))), "views was .*, now .*"),
    ],
)
def test_a_state_of_another_run_is_refused_and_the_difference_named(other, named, state, tmp_path):
    save_state(tmp_path / "s.safetensors", state, of())
    with pytest.raises(OutputError, match=f"belongs to another run: {named}"):
        load_state(tmp_path / "s.safetensors", other)


def test_epochs_may_differ_only_where_the_rate_is_constant():
    constant, cosine = (replace(PurifySettings(), schedule=name) for name in ("constant", "cosine"))
    assert of(constant) == of(replace(constant, epochs=3))
    assert of(cosine) != of(replace(cosine, epochs=3))


def test_nothing_to_resume_and_damage_are_said(state, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(OutputError, match="there is nothing to resume; run without --resume"):
        load_state(path, of())
    save_state(path, state, of())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StateError, match="this state is damaged"):
        load_state(path, of())


def test_a_history_of_another_kind_is_damage(state, tmp_path):
    path = tmp_path / "s.safetensors"
    for history in ([1], [[1.0]], ["x"]):
        write_state(path, history, {"student": state.student, "momentum": {}}, of())
        with pytest.raises(StateError, match="this state is damaged"):
            load_state(path, of())
        assert find_state(path, of()) is None


def test_what_cannot_be_read_is_not_taken_for_none(tmp_path):
    (tmp_path / "s.safetensors").mkdir()  # an error of the system, as a lost disk is
    with pytest.raises(OutputError, match="this state cannot be read") as refused:
        find_state(tmp_path / "s.safetensors", of())
    assert not isinstance(refused.value, StateError)


def test_a_state_that_is_of_no_use_is_told_and_the_run_begins(tmp_path):
    calls, said = [], []

    def run(*, resume, overwrite):
        calls.append((resume, overwrite))
        if resume:
            raise StateError("of another device")
        return "done"

    state = tmp_path / "x.state.safetensors"
    assert go_on(run, state, say=said.append) == "done"
    assert (calls, said) == ([(False, True)], [])
    state.touch()
    assert go_on(run, state, say=said.append) == "done"
    assert calls[1:] == [(True, False), (False, True)]
    assert said == ["starting again: of another device"]
