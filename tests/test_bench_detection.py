import json
import re
import sys

import pytest
from safetensors.torch import load_file

from unbackdoor import resume
from unbackdoor.bench.grid import CLEAN_ROW, entries, read_grid
from unbackdoor.bench.obtain import Place
from unbackdoor.bench.run import Tally, run_cells
from unbackdoor.bench.store import open_store, read_record
from unbackdoor.cli import main

GRID = """
table = "6"
tier = "cpu"
data = "{data}"
arch = "cifar/wrn16_1"
size = 8
target = 1
preset = "cpu"
attacks = ["blend"]
seeds = [0]

[victim]
epochs = 1
batch_size = 50
augment = "none"

[detection]
data = "voc:{voc}"
stages = ["block2", "relu"]
pictures = ["FT"]
epochs = 2
batch_size = 2
warmup = 0
shorter = 24
longer = 32
pyramid = 8
box_head = 16

[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "FT"
defense = "fine-tuning"
settings = {{ tuning = {{ epochs = 1 }} }}
"""
STEPS = 6  # of a detector: two epochs of three
IMAGES = 4  # that it is scored on


class Killed(BaseException):
    """Stands for a signal: it is no Exception, so it is not recorded as a failure."""


@pytest.fixture
def path(data, voc, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(data=data, voc=voc))
    return path


@pytest.fixture
def cells(path):
    return {entry.row: entry.cell for entry in entries(read_grid(path))}


@pytest.fixture
def run(path, tmp_path, monkeypatch):
    """Run one cell, here or in another folder of records; returns its record and what was said."""

    monkeypatch.setattr(resume, "SECONDS_BETWEEN_STATES", 0.0)

    def run(cell, on_step=None, results="results"):
        grid, lines = read_grid(path), []
        store = open_store(tmp_path / results)
        place = Place(
            grid.data,
            device="cpu",
            detection=grid.detection.data,
            pictures=(cell.key,),
        )
        tally = run_cells([cell], store, place, say=lines.append, on_step=on_step)
        assert tally == Tally(done=1)
        return read_record(store.record_path(cell.key)), lines

    return run


@pytest.mark.slow
def test_a_grid_with_detectors_runs_to_its_table_and_its_pictures(path, cells, tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "bench.html"
    common = [str(path), "--results", str(results)]
    assert main(["bench", "run", *common, "--device", "cpu"]) == 0
    records = {row: read_record(results / f"{cell.key}.json") for row, cell in cells.items()}
    assert set(records) == {CLEAN_ROW, "No Defense", "FT"}
    for record in records.values():
        made = record["detection"]
        assert set(made["scores"]) == {"clean", "triggered"}
        for scores in made["scores"].values():
            assert 0 <= scores["voc07"] <= 1
            assert -1 <= scores["coco"] <= 1
        assert made["attack"]["trigger"]["name"] == "blend"  # also for the clean victim
        assert (made["attack"]["side"], made["attack"]["target"]) == (8, 1)
        assert (made["data"]["images"], made["data"]["set"]) == (IMAGES, "test")
        assert made["detector"]["trained_on"]["set"] == "trainval"
        assert made["detector"]["settings"]["epochs"] == len(made["history"]) == 2
        assert record["cell"]["detection"]["data"] == "VOC2007"
        assert record["scores"]["after"]["probe"]["images"] == 20  # of the backbone, as ever
        assert record["seconds"]["all"] >= sum(made["seconds"].values())
        assert str(tmp_path) not in json.dumps(record)
    hashes = {record["detection"]["detector"]["backbone"]["sha256"] for record in records.values()}
    assert len(hashes) == 3  # each on a backbone of its own
    assert not any((results / "states").iterdir())  # no weights are left

    assert main(["bench", "table", *common]) == 0
    table = capsys.readouterr().out
    assert "| attack, defense | AP | PAP | COCO's AP | COCO's PAP | seeds | seconds |" in table
    ap = 100 * records["FT"]["detection"]["scores"]["clean"]["voc07"]
    assert re.search(rf"\| Blend: FT \| {ap:.1f} \[\d\] \|", table)
    precision = table.partition(": average precision**")[2].partition("linear probe before")[0]
    assert "the attack did not take" in precision  # a doubt about the victim
    assert main(["bench", "report", *common, "--out", str(page)]) == 0
    html = page.read_text()
    assert html.count("<h2>Detections: Blend: FT, seed 0, 00") == 2
    assert html.count('<img alt="found, triggered') == html.count('<img alt="found, clean') == 2
    assert str(tmp_path) not in html

    assert main(["bench", "run", *common, "--device", "cpu"]) == 0
    assert "grid: 0 cells to run, 3 not" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_detector_goes_on_and_its_backbone_is_not_repaired_again(run, cells):
    whole, _ = run(cells["FT"], results="whole")
    steps = []

    def kill_in_training(step, of):
        steps.append(of)
        if (step, of) == (5, STEPS):
            raise Killed

    with pytest.raises(Killed):
        run(cells["FT"], kill_in_training)
    assert set(steps) - {STEPS}  # the victim's and the defense's
    seen = []
    record, lines = run(cells["FT"], lambda *step: seen.append(step))
    assert "resuming after step 4" in lines
    rest = [(step, STEPS) for step in (5, 6)]
    assert seen == [*rest, *((row + 1, IMAGES) for row in range(IMAGES))]
    assert record["detection"]["scores"] == whole["detection"]["scores"]
    losses = [[loss for loss, _ in made["detection"]["history"]] for made in (record, whole)]
    assert losses[0] == losses[1]
    assert record["scores"] == whole["scores"]
    assert record["told"] == whole["told"]


def test_a_kill_between_the_detector_and_its_scores_trains_nothing_again(run, cells, tmp_path):
    def kill_in_scoring(step, of):
        if (step, of) == (1, IMAGES):
            raise Killed

    with pytest.raises(Killed):
        run(cells["No Defense"], kill_in_scoring)
    folder = tmp_path / "results"
    (victim,) = folder.glob("victims/*/blend-*.safetensors")
    kept = folder / "states" / f"{cells['No Defense'].key}.backbone.safetensors"
    delivered, trained_on = load_file(victim), load_file(kept)
    assert delivered.keys() == trained_on.keys()
    assert all(value.equal(trained_on[name]) for name, value in delivered.items())

    seen = []
    record, _ = run(cells["No Defense"], lambda *step: seen.append(step))
    assert seen == [(row + 1, IMAGES) for row in range(IMAGES)]
    assert len(record["detection"]["history"]) == 2


@pytest.mark.slow
def test_a_detector_of_another_backbone_is_not_taken_for_this_ones(run, cells, tmp_path):
    def kill_in_scoring(step, of):
        if of == IMAGES:
            raise Killed

    cell = cells["No Defense"]
    with pytest.raises(Killed):
        run(cell, kill_in_scoring)
    beside = tmp_path / "results" / "states" / f"{cell.key}.detector.json"
    made = json.loads(beside.read_text())
    made["backbone"]["sha256"] = "0" * 64
    beside.write_text(json.dumps(made))
    seen = []
    run(cell, lambda *step: seen.append(step))
    assert seen[:STEPS] == [(step + 1, STEPS) for step in range(STEPS)]


def refused(path, capsys, *words):
    """Return what ``bench run`` says; nothing was run."""
    results = path.parent / "refused"
    assert main(["bench", "run", str(path), "--results", str(results), *words]) == 2
    assert not any(file for file in results.rglob("*") if file.is_file())
    return capsys.readouterr().err


def test_without_the_extra_nothing_runs(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    said = refused(path, capsys)
    assert "a grid with [detection] scores COCO's AP too" in said.replace("\n", " ")
    assert "pip install '.[detection]'" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cifar/wrn16_1", "vit_tiny_patch16_224", "vit_tiny_patch16_224: has no module 'block2'"),
        ('stages = ["block2", "relu"]\n', "arch", "its stages are not known; name the modules"),
        ("[detection]", '[detection]\ntest = "tset"', "has no set 'tset'; there are: test"),
        ("[detection]", '[detection]\ntest = "trainval"', "images are in both sets, trainval to"),
    ],
)
def test_what_cannot_carry_a_detector_is_refused_before_anything_runs(
    path, capsys, old, new, message
):
    text = path.read_text()
    assert old in text
    if new == "arch":
        text, new = text.replace("cifar/wrn16_1", "vit_tiny_patch16_224"), ""
    path.write_text(text.replace(old, new))
    assert message in refused(path, capsys).replace("\n", " ")


def test_missing_data_is_told_before_anything_runs(path, capsys):
    assert "nowhere: has no folder Annotations" in (
        refused(path, capsys, "--detection-data", "voc:nowhere").replace("\n", " ")
    )
    text = path.read_text()
    path.write_text(text.partition("[detection]")[0] + "[[rows]]" + text.partition("[[rows]]")[2])
    assert "has no detectors" in refused(path, capsys, "--detection-data", "voc:nowhere")
