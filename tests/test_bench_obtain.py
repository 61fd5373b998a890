import json
import shutil
import threading
from dataclasses import asdict
from functools import cache

import pytest
from conftest import GRID_HEAD

from unbackdoor import resume
from unbackdoor.bench import obtain as obtaining
from unbackdoor.bench.grid import entries, read_grid
from unbackdoor.bench.obtain import Place, load_sets, obtain_victim
from unbackdoor.bench.store import claimed, open_store
from unbackdoor.errors import OutputError

GRID = (
    GRID_HEAD
    + """
[victim]
epochs = 3
batch_size = 50
augment = "none"

[[rows]]
name = "No Defense"
defense = "none"
"""
)


@pytest.fixture
def victim(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(data=data))
    return entries(read_grid(path))[-1].cell.victim


@pytest.fixture
def obtain(victim, data, tmp_path, monkeypatch):
    """Obtain the victim, until an error if one is given; returns what was said, and its state."""
    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)
    store = open_store(tmp_path / "results")
    state = store.victim_folder(victim.key) / f"{victim.stem}.state.safetensors"

    def run(*, fails=None):
        said = []

        def on_step(done, steps):
            if fails is not None and done > steps * fails:
                raise OutputError("no space left")

        options = {"load": cache(load_sets), "say": said.append, "on_step": on_step}
        try:
            obtain_victim(victim, store, Place(data, device="cpu"), **options)
        except OutputError as error:
            said.append(str(error))
        return said, state

    return run


def test_a_write_that_fails_keeps_the_epochs_of_a_resumed_training(obtain):
    _, state = obtain(fails=0.5)
    kept = state.read_bytes()
    said, _ = obtain(fails=0.4)
    assert any("resuming after epoch 1 of 3" in line for line in said)
    assert said[-1] == "no space left"
    assert state.read_bytes() == kept
    said, _ = obtain()
    assert any("resuming after epoch 1 of 3" in line for line in said)
    assert not state.exists()


def test_a_state_that_is_damaged_is_started_again(obtain):
    _, state = obtain(fails=0.5)
    state.write_bytes(b"x")
    said, _ = obtain()
    assert any("starting again: " in line and "this state is damaged" in line for line in said)
    assert not any("resuming" in line for line in said)


@pytest.mark.parametrize("record", ['{"attack": {"name": "badnets"}}', '{"attack": 1}'])
def test_a_given_victim_with_a_damaged_record_is_not_used(victim, data, tmp_path, record):
    made = json.loads(json.dumps({"kind": "supervised", **asdict(victim.settings)}))
    files = obtaining.victim_files(victim, tmp_path)
    files.tensors.touch()
    whole = {"training": made, "arch": victim.arch, "size": victim.size, **json.loads(record)}
    files.record.write_text(json.dumps(whole))
    said, store = [], open_store(tmp_path / "results")
    place = Place(data, str(tmp_path), device="cpu")
    options = {"load": cache(load_sets), "say": said.append}
    assert obtaining.find_victim(victim, store, place, **options) is None
    assert said[0].endswith("not used, for its record is damaged")


def test_a_victim_that_somebody_else_trains_is_waited_for(victim, data, tmp_path, monkeypatch):
    monkeypatch.setattr(obtaining, "WAIT", 0.01)
    said = []
    options = {"load": cache(load_sets), "say": said.append, "on_step": lambda *_: None}
    place = Place(data, device="cpu")
    elsewhere = open_store(tmp_path / "elsewhere")
    trained = obtain_victim(victim, elsewhere, place, **options)
    said.clear()
    store, other = (open_store(tmp_path / "results", owner=owner) for owner in ("me", "other"))
    folder = store.victim_folder(victim.key)
    with claimed(other, victim.key):
        threading.Timer(0.3, shutil.copytree, (trained.tensors.parent, folder)).start()
        found = obtain_victim(victim, store, place, **options)
    assert found.tensors == folder / trained.tensors.name
    assert not any("epoch" in line for line in said)
