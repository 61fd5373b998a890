import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GRID_HEAD, write_shades

from unbackdoor.attacks.poisoning import Attack
from unbackdoor.attacks.triggers import BadNets
from unbackdoor.bench.cells import Cell, as_record
from unbackdoor.bench.features import from_base64
from unbackdoor.bench.grid import CLEAN_ROW, entries, read_grid, unique_cells
from unbackdoor.bench.jobs import cells_by_victim, run_grids
from unbackdoor.bench.obtain import Place, check_imagenet100, load_sets, surrogate_of
from unbackdoor.bench.run import (
    Tally,
    attack_of,
    by_victim,
    defender_images,
    draw_cells,
    flags_of,
    method_precision,
    repair_key,
    run_cells,
)
from unbackdoor.bench.store import (
    claimed,
    is_running,
    open_store,
    read_features,
    read_record,
)
from unbackdoor.checkpoint import sha256_of
from unbackdoor.cli import main
from unbackdoor.data import LabeledImages, load_labeled
from unbackdoor.defense_jobs import load_pool
from unbackdoor.defenses import keeping
from unbackdoor.errors import DataError
from unbackdoor.evaluation import Known
from unbackdoor.metrics import Reading, Scores

PACKAGE = Path(__file__).resolve().parents[1] / "unbackdoor"
GRIDS = Path(__file__).resolve().parents[1] / "grids"
GRID = (
    GRID_HEAD
    + """victims = "{victims}"

[victim]
epochs = 2
batch_size = 50
augment = "none"

[cbd]
epochs = 3
batch_size = 8
changes = {{ patches = 1, warps = 3, steps = 1 }}

[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "FT"
defense = "fine-tuning"
labels = "pseudo"
settings = {{ tuning = {{ epochs = 1 }} }}

[[rows]]
name = "broken"
defense = "cbd"
settings = {{ batch_size = 4096 }}

[[rows]]
name = "CBD"
defense = "cbd"
"""
)


class Killed(BaseException):
    """Stands for a signal: it is no Exception, so it is not recorded as a failure."""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two classes of images, dark and bright: 400 for training, 60 for the test."""
    return write_shades(tmp_path_factory.mktemp("bench") / "shades", train=200, test=30)


@pytest.fixture
def grid(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(data=data, victims=tmp_path / "given"))
    return read_grid(path)


@pytest.fixture
def cells(grid):
    return {entry.row: entry.cell for entry in entries(grid)}


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "results")


@pytest.fixture
def run(grid, store, tmp_path):
    """Run cells; returns the tally and the lines that were said."""

    def run(cells, on_step=None, **options):
        lines = []
        place = Place(grid.data, grid.victims, device="cpu", **options)
        tally = run_cells(cells, store, place, say=lines.append, on_step=on_step)
        return tally, lines

    return run


def record_of(store, cell):
    return read_record(store.record_path(cell.key))


def test_a_grid_runs_and_each_record_says_all(run, store, cells):
    drop = tuple(cells_by_victim(cells.values()).items())
    tally, lines = run(cells.values(), features=(cells["CBD"].key,), drop=drop)
    assert tally == Tally(done=4, failed=1, left=0)
    assert "loss" in "".join(lines)
    folders = list((store.folder / "victims").iterdir())
    assert {folder.name for folder in folders} == {cell.victim.key for cell in cells.values()}
    assert {path.suffix for folder in folders for path in folder.iterdir()} == {".json"}  # dropped
    clean = record_of(store, cells[CLEAN_ROW])
    assert clean["cell"]["victim"]["attack"] == "clean"
    assert clean["scores"]["after"]["probe"]["triggered"] == 30

    error = store.error_of(cells["broken"].key)
    assert error.startswith("DataError: ")
    assert "do not fill one batch of 4096" in error

    record = record_of(store, cells["CBD"])
    assert record["cell"] == json.loads(json.dumps(as_record(cells["CBD"])))
    assert len(record["history"]) == 3
    assert record["told"]["images"] == 20
    assert record["data"]["probe"] == 4
    assert set(record["seconds"]) == {"defense", "all"}
    assert record["peak_memory"] > 0
    assert record["versions"]["torch"] == torch.__version__
    for when in ("before", "after"):
        scores = record["scores"][when]
        assert all(0 <= scores[name]["asr"] <= 1 for name in scores)
        assert scores["reestimated"]["triggered"] == 30  # of the other class
    assert record["scores"]["before"] == record_of(store, cells["No Defense"])["scores"]["after"]
    tuned = record_of(store, cells["FT"])
    assert 0 <= tuned["told"]["pseudo_label_accuracy"] <= 1

    features = json.loads(store.features_path(cells["CBD"].key).read_text())
    assert set(features["panels"]["after"]) == {
        *("bright", "target: dark", "triggered", "adversarial"),
    }
    images = json.loads(store.images_path(cells["CBD"].key).read_text())
    clean, triggered = (from_base64(images[name]) for name in ("clean", "triggered"))
    assert read_features(store, cells["CBD"].key) == {**features, "attack": images}
    assert clean.shape == (6, 3, 8, 8)
    assert (clean != triggered).any()
    assert not any((store.folder / "running").iterdir())


def test_what_the_report_draws_of_a_done_cell_can_be_made_later(run, grid, store, cells):
    some = [cells["CBD"], cells["FT"]]
    run(some[:1], features=(some[0].key,))
    path = store.features_path(some[0].key)
    kept, record = path.read_bytes(), store.record_path(some[0].key).read_bytes()
    pictures = store.images_path(some[0].key)
    images = pictures.read_bytes()
    place = Place(grid.data, grid.victims, device="cpu", features=tuple(cell.key for cell in some))
    assert draw_cells(some, store, place) == 0  # one has it, the other has no record
    pictures.unlink()
    steps = []
    alone = place._replace(victims="")  # as where weights were dropped
    assert draw_cells(some, store, alone, on_step=lambda step, of: steps.append(step)) == 1
    assert steps == []  # nothing is trained or repaired for them
    assert pictures.read_bytes() == images
    path.unlink()
    assert draw_cells(some, store, place._replace(features=())) == 0
    assert draw_cells(some, store, place) == 1
    assert path.read_bytes() == kept
    assert store.record_path(some[0].key).read_bytes() == record
    for left in ("running", "states"):
        assert not any((store.folder / left).iterdir())


OWN = """
import copy
from dataclasses import dataclass
import torch
from unbackdoor.defenses.common import Defended

@dataclass(frozen=True)
class Settings:
    factor: float = 0.5

def shrink(backbone, data, settings: Settings, *, device="cpu", on_step=None):
    repaired = copy.deepcopy(backbone)
    with torch.no_grad():
        repaired.body.conv1.weight.mul_(settings.factor)
    return Defended(repaired, {"factor": settings.factor, "told": data.labels is not None})

def logs_nothing_finite(backbone, data, settings, *, device="cpu", on_step=None):
    return Defended(copy.deepcopy(backbone), {"loss": float("nan")})

def returns_nothing(backbone, data, settings, *, device="cpu", on_step=None):
    pass
"""
ROWS = """
[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "mine"
defense = "mine.py:shrink"
labels = "given"
settings = { factor = 0 }

[[rows]]
name = "mine, as it is"
defense = "mine.py:shrink"
settings = { factor = 1 }

[[rows]]
name = "broken"
defense = "mine.py:returns_nothing"

[[rows]]
name = "broken, too"
defense = "mine.py:logs_nothing_finite"
"""


def test_a_defense_in_a_file_is_run_and_scored_like_ours(data, tmp_path, capsys):
    text = GRID.format(data=data, victims=tmp_path / "given").partition("[[rows]]")[0]
    path, results = tmp_path / "grid.toml", tmp_path / "results"
    path.write_text(f"{text.replace('[victim]', 'clean = false' + chr(10) + '[victim]')}{ROWS}")
    (tmp_path / "mine.py").write_text(OWN)
    command = ["bench", "run", str(path), "--results", str(results), "--device", "cpu"]
    assert main([*command, "--limit", "1", "--drop-victims"]) == 0
    assert "grid: 1 cells to run, 4 not" in capsys.readouterr().out
    (weights,) = (results / "victims").glob("*/*.safetensors")  # for the other rows
    assert main([*command, "--drop-victims"]) == 2
    assert not weights.exists()
    weights.touch()  # as after a kill right at the end
    assert main([*command, "--drop-victims"]) == 2  # what failed has not been forgotten
    assert not weights.exists()
    said = capsys.readouterr()
    assert "mine.py:returns_nothing returned a NoneType; a defense returns Defended" in said.out
    assert "mine.py:logs_nothing_finite: its log must be what JSON can hold" in said.out
    assert "2 cells failed" in said.err

    cells = {entry.row: entry.cell for entry in entries(read_grid(path))}
    store = open_store(results)
    records = {row: record_of(store, cells[row]) for row in ("No Defense", "mine")}
    mine = records["mine"]
    assert mine["cell"]["code"] == cells["mine"].code
    assert mine["log"] == {"factor": 0.0, "told": True}
    assert mine["told"]["labels"] == "given"
    assert mine["flags"] == records["No Defense"]["flags"]
    same = record_of(store, cells["mine, as it is"])
    assert same["log"] == {"factor": 1.0, "told": False}
    assert same["scores"]["after"] == records["No Defense"]["scores"]["after"]
    assert mine["scores"]["after"]["head"]["acc"] == 0.5  # it sees nothing: one of two classes
    assert str(tmp_path) not in json.dumps(mine)

    with (tmp_path / "mine.py").open("a") as file:
        file.write("# another\n")
    assert main(["bench", "status", str(path), "--results", str(results)]) == 0
    assert "1 done, 0 running, 0 failed, 4 left" in capsys.readouterr().out


@pytest.mark.slow
def test_a_victim_is_trained_on_from_the_grids_file_and_no_other_is_taken_for_it(data, tmp_path):
    text = GRID.format(data=data, victims=tmp_path / "given").partition("[[rows]]")[0]
    path, lines = tmp_path / "grid.toml", []
    path.write_text(text + ROWS.partition('[[rows]]\nname = "mine"')[0])
    plain, store = read_grid(path), open_store(tmp_path / "results")

    def made(grid):
        place = Place(grid.data, grid.victims, "cpu", "fp32", start=grid.start)
        run_cells(unique_cells(entries(grid)), store, place, say=lines.append)
        cell = next(e.cell for e in entries(grid) if e.row == "No Defense")
        folder = store.victim_folder(cell.victim.key)
        return json.loads((folder / f"{cell.victim.stem}.json").read_text()), folder

    record, folder = made(plain)
    assert record["start"] is None
    start = next(folder.glob("*.safetensors"))
    path.write_text(f'start = "{start}"\n' + path.read_text())
    grid = replace(read_grid(path), victims=str(folder))
    record, _ = made(grid)
    assert record["start"] == sha256_of(start)
    assert any("not used, for it was trained on from other weights" in line for line in lines)


def test_an_attack_with_other_options_has_its_own_victim_and_trigger(data, tmp_path, store):
    text = GRID.format(data=data, victims=tmp_path / "given").partition("[[rows]]")[0]
    text = text.replace('attacks = ["badnets"]', 'attacks = ["badnets", "wide"]')
    trigger = 'trigger = {position = "center", size = 5}'
    text += f'[variants.wide]\nattack = "badnets"\nshare = 0.2\n{trigger}\n'
    path = tmp_path / "grid.toml"
    path.write_text(text + '[[rows]]\nname = "No Defense"\ndefense = "none"\n')
    cells = {(entry.attack, entry.row): entry.cell for entry in entries(read_grid(path))}
    lines = []

    def run(names, victims=""):
        place = Place(str(data), victims, device="cpu")
        return run_cells([cells[name] for name in names], store, place, say=lines.append)

    assert run([("badnets", "No Defense")]) == Tally(1, 0, 0)
    shutil.copytree(
        store.victim_folder(cells["badnets", "No Defense"].victim.key), tmp_path / "given"
    )
    assert run([("wide", "No Defense")], str(tmp_path / "given")) == Tally(1, 0, 0)
    assert any(line.endswith("not used, for it was poisoned otherwise") for line in lines)
    assert "80 of 400" in "\n".join(lines)
    usual, wide = (record_of(store, cells[name, "No Defense"]) for name in ("badnets", "wide"))
    planted = wide["victim"]["attack"]
    assert (planted["share"], planted["trigger"]["position"]) == (0.2, "center")
    assert planted["trigger"]["size"] == 5
    assert usual["victim"]["attack"]["trigger"]["size"] == 3
    clean = cells["wide", CLEAN_ROW]
    under = attack_of(clean, {"size": 8})
    assert (under.trigger, under.target) == (BadNets(size=5, position="center"), 1)
    assert repair_key(clean) == repair_key(cells["badnets", CLEAN_ROW])
    assert attack_of(cells["wide", "No Defense"], wide["victim"]).trigger == under.trigger


def test_the_method_computes_as_the_baselines_do_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr("unbackdoor.bench.run.pick_precision", lambda *_: "bf16")  # as on CUDA
    assert method_precision(Place("", device="cpu")) == "fp32"
    assert method_precision(Place("", device="cpu", precision="bf16")) == "bf16"


def test_a_clean_victim_is_repaired_once_and_scored_under_every_attack(grid, run, store):
    (row,) = (replace(row, innocent=True) for row in grid.rows if row.name == "CBD")
    wider = replace(grid, rows=(row,), attacks=("badnets", "sig"))
    name = f"{CLEAN_ROW}, CBD"
    cells = {entry.attack: entry.cell for entry in entries(wider) if entry.row == name}
    assert {cell.victim.attack for cell in cells.values()} == {"clean"}
    run(cells.values())
    first, second = (record_of(store, cells[attack]) for attack in ("badnets", "sig"))
    assert first["history"] == second["history"]
    assert first["seconds"]["defense"] == second["seconds"]["defense"] > 0  # what it takes
    assert second["seconds"]["all"] < second["seconds"]["defense"] + first["seconds"]["all"]
    acc = [record["scores"]["after"]["probe"]["acc"] for record in (first, second)]
    assert acc[0] == acc[1]


@pytest.mark.slow
def test_a_clean_victims_repair_is_kept_until_all_its_attacks_are_done(grid, store):
    (row,) = (replace(row, innocent=True) for row in grid.rows if row.name == "CBD")
    wider = replace(grid, rows=(row,), attacks=("badnets", "sig"))
    found = [entry.cell for entry in entries(wider) if entry.row == f"{CLEAN_ROW}, CBD"]
    (state,) = {store.state_path(repair_key(cell)) for cell in found}
    place, steps = Place(grid.data, grid.victims, device="cpu"), []

    def kill_before_the_second(line):
        if line.startswith("clean under sig"):
            raise Killed

    def on_step(step, of):
        if of == 6:  # three epochs of two steps
            steps.append(step)

    with pytest.raises(Killed):
        run_cells(found, store, place, say=kill_before_the_second, on_step=on_step)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert state.exists()
    run_cells(found, store, place, say=lambda line: None, on_step=on_step)
    assert len(steps) == 6  # it is not repaired again
    assert not state.exists()
    histories = [record_of(store, cell)["history"] for cell in found]
    assert histories[0] == histories[1]


def test_after_a_kill_between_cells_nothing_is_computed_again(run, store, cells):
    wanted = [cells["No Defense"], cells["FT"], cells["CBD"]]

    def kill_in_ft(step, steps):
        if store.is_done(wanted[0].key):
            raise Killed

    with pytest.raises(Killed):
        run(wanted, kill_in_ft)
    assert store.is_done(wanted[0].key)
    assert not store.is_done(wanted[1].key)
    assert not is_running(store, wanted[1].key)
    before = store.record_path(wanted[0].key).stat().st_mtime_ns
    (victim,) = (store.folder / "victims").glob("*/*.safetensors")
    trained = victim.stat().st_mtime_ns

    tally, lines = run(wanted)
    assert tally == Tally(done=2)
    assert not [line for line in lines if "epoch" in line]  # the victim is not trained again
    assert victim.stat().st_mtime_ns == trained
    assert store.record_path(wanted[0].key).stat().st_mtime_ns == before
    assert run(wanted)[0] == Tally()


@pytest.mark.slow
def test_a_kill_loses_the_last_epoch_at_most_and_changes_no_result(run, store, cells, grid):
    cell = cells["CBD"]
    whole = open_store(store.folder.parent / "whole")
    place = Place(grid.data, grid.victims, device="cpu")
    run_cells([cell], whole, place, say=lambda line: None)

    steps = []

    def kill_in_the_last_epoch(step, of):
        if of == 6 and step == 1:
            time.sleep(2)
        if of == 6 and step == 6:  # three epochs of two steps
            raise Killed

    with pytest.raises(Killed):
        run([cell], kill_in_the_last_epoch)
    assert store.state_path(repair_key(cell)).exists()
    run([cell], lambda step, of: steps.append(step) if of == 6 else None)
    assert steps[-2:] == [5, 6]
    assert 1 not in steps
    assert not store.state_path(repair_key(cell)).exists()
    one, other = (record_of(each, cell) for each in (whole, store))
    assert one["scores"] == other["scores"]
    assert other["seconds"]["all"] > other["seconds"]["defense"] >= 2  # of both runs
    assert [epoch["total"] for epoch in one["history"]] == [
        epoch["total"] for epoch in other["history"]
    ]


def test_a_killed_baseline_goes_on_after_its_last_epoch(run, store, cells, grid, monkeypatch):
    monkeypatch.setattr(keeping, "SECONDS", 0.0)
    longer = dict(cells["FT"].settings) | {"tuning.epochs": 5}
    cell = replace(cells["FT"], settings=tuple(sorted(longer.items())))
    whole = open_store(store.folder.parent / "whole")
    run_cells([cell], whole, Place(grid.data, device="cpu"), say=lambda line: None)

    def kill_in_the_last_epoch(step, of):
        if (step, of) == (1, 5):
            time.sleep(2)
        if (step, of) == (5, 5):
            raise Killed

    with pytest.raises(Killed):
        run([cell], kill_in_the_last_epoch)
    assert store.state_path(repair_key(cell)).exists()
    steps = []
    run([cell], lambda step, of: steps.append(step) if of == 5 else None)
    assert steps == [5]
    assert not store.state_path(repair_key(cell)).exists()
    made = record_of(store, cell)
    assert record_of(whole, cell)["scores"] == made["scores"]
    assert made["seconds"]["all"] > made["seconds"]["defense"] >= 2  # of both runs


@pytest.mark.slow
def test_a_victim_that_is_given_is_used_only_if_it_is_the_same(run, store, cells, tmp_path):
    run([cells["No Defense"]])
    (folder,) = (store.folder / "victims").iterdir()
    folder.rename(tmp_path / "given")
    tally, lines = run([cells["CBD"]])
    assert tally.done == 1
    assert not [line for line in lines if "not used" in line or "epoch" in line]

    (path,) = (tmp_path / "given").rglob("*-seed0.json")
    kept = path.read_text()
    made = json.loads(kept)
    for seed, changed, why in (
        (5, {"attack": {**made["attack"], "share": 0.01}}, "it was poisoned otherwise"),
        (6, {"sha256": "0" * 64}, "its weights are not those of its record"),
    ):
        path.write_text(json.dumps({**made, **changed}))
        shutil.rmtree(store.folder / "victims", ignore_errors=True)
        _, lines = run([replace(cells["No Defense"], seed=seed)])
        assert f"not used, for {why}" in "".join(lines)
        assert "epoch 1/" in "".join(lines)
    for seed, text in ((7, "{"), (8, "null")):
        path.write_text(text)
        shutil.rmtree(store.folder / "victims", ignore_errors=True)
        tally, lines = run([replace(cells["No Defense"], seed=seed)])
        assert tally.done == 1
        assert "not used, for its record is damaged" in "".join(lines)
    path.write_text(kept)

    other = cells["No Defense"].victim
    other = replace(other, settings=replace(other.settings, epochs=1))
    _, lines = run([replace(cells["No Defense"], victim=other)])
    assert "not used, for it was trained with other settings" in "".join(lines)
    assert "epoch 1/1" in "".join(lines)


@pytest.mark.slow
def test_a_victim_of_two_grids_is_one_job_and_dropped_also_by_a_later_run(data, tmp_path):
    head = GRID.format(data=data, victims="").partition("[[rows]]")[0]
    head = head.replace('["badnets"]', '["badnets", "blend"]').replace("epochs = 2", "epochs = 1")
    paths = [tmp_path / f"{name}.toml" for name in ("none", "clp")]
    for path in paths:
        path.write_text(f'{head}[[rows]]\nname = "{path.stem}"\ndefense = "{path.stem}"\n')
    lines, results = [], tmp_path / "results"
    assert run_grids(paths, results, device="cpu", say=lines.append) == 0
    said = [line.split()[0] for line in lines if "seed 0" in line]
    assert said == ["clean", "clean", "badnets", "badnets", "blend", "blend"]
    assert len(list(results.rglob("victims/*/*.safetensors"))) == 3
    assert run_grids(paths, results, device="cpu", drop_victims=True, say=lines.append) == 0
    assert lines[-1] == "none, clp: 0 done, 0 failed, 0 left to others"
    assert not list(results.rglob("victims/*/*.safetensors"))


def test_the_surrogate_of_an_attack_is_needed_by_its_cells_too(grid):
    found = unique_cells(entries(replace(grid, attacks=("badnets", "cla"))))
    kinds = {(cell.victim.attack, cell.victim.settings.augment): cell.victim for cell in found}
    needed = cells_by_victim(found)
    assert set(needed) == {victim.key for victim in kinds.values()} | {
        surrogate_of(kinds["cla", "none"]).key,
    }
    of_cla = {cell.key for cell in found if cell.victim.attack == "cla"}
    assert of_cla == set(needed[kinds["cla", "none"].key])
    assert of_cla <= set(needed[surrogate_of(kinds["cla", "none"]).key])
    assert surrogate_of(kinds["badnets", "none"]) is None
    for size, augment in ((32, "shift"), (224, "views")):  # as for a clean victim of this size
        assert surrogate_of(replace(kinds["cla", "none"], size=size)).settings.augment == augment
    large = replace(kinds["cla", "none"], size=0, arch="torchvision/resnet18")
    assert surrogate_of(large).settings.augment == "views"


def test_a_victim_that_cannot_be_trained_is_tried_once(run, store, cells):
    other = cells["No Defense"].victim
    other = replace(other, settings=replace(other.settings, batch_size=4096))
    wanted = [replace(cells[row], victim=other) for row in ("No Defense", "FT")]
    tally, lines = run([*wanted, cells[CLEAN_ROW]])
    assert tally == Tally(done=1, failed=2)
    errors = {store.error_of(cell.key) for cell in wanted}
    assert len(errors) == 1
    assert "4096" in errors.pop()
    assert len([line for line in lines if line.startswith("badnets supervised")]) == 1


def test_a_training_that_leaves_another_victim_is_not_tried_without_end(
    run, store, cells, tmp_path
):
    (tmp_path / "mine.py").write_text(
        "from unbackdoor.networks import SMALL_NETWORKS\n"
        "def net(classes):\n"
        "    network = SMALL_NETWORKS['wrn16_1'](classes)\n"
        "    network.mean, network.std, network.size = (0, 0, 0), (1, 1, 1), 8\n"
        "    return network\n"
    )
    other = replace(cells["No Defense"].victim, arch=f"{tmp_path}/mine.py:net")
    cell = replace(cells["No Defense"], victim=other)
    assert run([cell])[0] == Tally(failed=1)
    assert "left no victim of this grid" in store.error_of(cell.key)


def test_a_cell_that_somebody_else_has_is_left_to_them(run, store, cells):
    cell = cells["No Defense"]
    with claimed(open_store(store.folder, owner="another"), cell.key):
        assert run([cell])[0] == Tally(left=1)
    assert not store.is_done(cell.key)


def test_cells_of_one_victim_are_one_job(cells):
    groups = by_victim(cells.values())
    found = [(victim.attack, len(group)) for victim, group in groups]
    assert found == [("clean", 1), ("badnets", 4)]


@pytest.mark.parametrize(("labels", "share"), [("given", 0.01), ("pseudo", 0.05), ("none", 0.2)])
def test_a_defense_has_the_images_that_the_command_line_gives_it(cells, data, labels, share):
    cell = replace(cells["FT"], labels=labels, share=share)
    pool = load_pool(str(data), size=8, labels=labels, share=share, seed=cell.seed)
    found = defender_images(load_labeled(str(data), split="train", size=8), cell)
    assert found.images.equal(pool.images)
    assert pool.truth is None if labels == "none" else found.labels.equal(pool.truth)


def test_a_share_that_is_not_there_is_refused(cells, data):
    train = load_labeled(str(data), split="train", size=8)
    with pytest.raises(DataError, match="share 1 of 400 images"):
        defender_images(train, replace(cells["FT"], share=1.0))


def test_the_embedded_images_are_divided_into_training_and_test_images():
    train, test = load_sets("fashion-mnist", 28)
    assert (len(train.labels), len(test.labels)) == (4_000, 200)
    assert train.images.shape[1:] == (3, 28, 28)


def test_imagenet100_has_the_classes_of_the_papers_list(tmp_path):
    names = (PACKAGE / "bench" / "imagenet100.txt").read_text().split()
    check_imagenet100("imagenet100", names)
    check_imagenet100("imagenet100", [str(number) for number in range(100)])  # of shards
    for classes, message in (
        ([*names[:99], "n99999999"], rf"100 classes, and lacks 1 .* such as {names[99]}; docs/"),
        (names[:60], "60 classes, and lacks 40"),
        ([str(number) for number in range(10)], "has 10 classes; "),
    ):
        with pytest.raises(DataError, match=message):
            check_imagenet100("imagenet100", classes)
    root = write_shades(tmp_path / "imagenet100", train=2, test=2)
    with pytest.raises(DataError, match="has 2 classes; "):
        load_sets(str(root), 8)
    assert load_sets(str(root.rename(tmp_path / "mine")), 8).train.classes == ("bright", "dark")


def test_flags_tell_what_to_doubt(cells):
    reading = Reading(None, *[Scores(1.0, 0.0, 1.0, 100, 90)] * 2)
    attack = Attack(BadNets())
    weak, took = (Known(attack, "badnets", True, asr) for asr in (0.5, 0.95))
    probe = LabeledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), ("a", "b"))
    assert flags_of(cells["CBD"], weak, reading, probe) == [
        "the victim's own ASR was 50.0 %, below 90 %: the attack did not take",
        "only 90 triggered images",
    ]
    many = reading._replace(probe=Scores(1.0, 0.0, 1.0, 1000, 900))
    assert flags_of(cells["CBD"], took, many, probe) == []
    (doubt,) = flags_of(cells["CBD"], took, many, probe._replace(classes=("a", "b", "c")))
    assert doubt.startswith("1 of 3 classes have none of the 2 labeled images")
    (doubt,) = flags_of(cells["CBD"], took, many, probe._replace(classes=tuple("abcdefg")))
    assert doubt.endswith("the target 6 too: their ASR is 0 whatever the network")
    told: Cell = replace(cells["CBD"], labels="given")
    assert flags_of(told, took, many, probe) == ["a label-free method was given labels"]


@pytest.mark.slow
def test_the_revision_is_that_of_the_code_that_runs(tmp_path):
    """Files that change during a run do not change it, nor what is recorded."""
    shutil.copytree(PACKAGE, tmp_path / "unbackdoor", ignore=shutil.ignore_patterns("*.pyc"))
    code = (
        "from pathlib import Path\n"
        "from unbackdoor.bench.obtain import Place\n"
        "from unbackdoor.bench.run import revision, run_cells\n"
        "from unbackdoor.bench.store import open_store\n"
        "run_cells([], open_store(Path('results')), Place(''))\n"
        "Path('unbackdoor/errors.py').unlink()\n"
        "print(revision())\n"
    )
    git = shutil.which("git")
    told = {"PYTHONPATH": ".", "UNBACKDOOR_REVISION": "of a copy\n"}
    command = [
        sys.executable,
        "-B",
        "-c",
        code.replace("Path('unbackdoor/errors.py').unlink()", ""),
    ]
    options = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    assert subprocess.run(command, env=told, **options).stdout.startswith("of a copy")
    *_, head, found = (
        subprocess.run(words, env=told, **options).stdout
        for words in (
            [git, "init"],
            [git, "add", "unbackdoor"],
            [git, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--message", "all"],
            [git, "rev-parse", "HEAD"],
            [sys.executable, "-B", "-c", code],
        )
    )
    assert found == head


@pytest.mark.slow
def test_the_smoke_grid_runs_on_what_comes_with_the_package(tmp_path):
    path = GRIDS / "smoke.toml"
    grid = read_grid(path)
    store = open_store(tmp_path / "results")
    cells = unique_cells(entries(grid))
    tally = run_cells(cells, store, Place(grid.data, device="cpu"), say=lambda line: None)
    assert tally == Tally(done=len(cells))
    undefended = record_of(store, cells[0])["scores"]["after"]
    assert undefended["head"]["asr"] > 0.95  # it is a victim
    assert undefended["head"]["acc"] > 0.85
    for cell in cells:
        assert math.isfinite(record_of(store, cell)["scores"]["after"]["probe"]["acc"])
