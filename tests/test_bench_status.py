import json
from dataclasses import replace

import pytest

from unbackdoor.bench.cells import Cell, Detection, Victim, as_record
from unbackdoor.bench.status import as_lines, estimate, status_of
from unbackdoor.bench.store import (
    NEEDED,
    SCHEMA,
    claimed,
    open_store,
    write_failure,
    write_record,
)
from unbackdoor.settings import DetectionSettings, VictimSettings

VICTIM = Victim("badnets", "supervised", "small", "shades", 8, 1, 0, VictimSettings(epochs=1))
CELL = Cell(VICTIM, "badnets", "clp", (), "none", 0.05, 0)
DETECTION = Detection("bccd", "trainval", "test", (), DetectionSettings())


def record(cell, seconds, victim_seconds):
    return {
        **dict.fromkeys(NEEDED),
        "schema": SCHEMA,
        "cell": json.loads(json.dumps(as_record(cell))),
        "victim": {"key": cell.victim.key, "seconds": victim_seconds},
        "seconds": {"all": seconds},
    }


def test_the_estimate_is_the_median_of_the_same_kind_and_that_of_all_is_a_guess():
    records = [record(replace(CELL, seed=seed), 10.0 * seed, 100.0) for seed in (1, 2, 9)]
    left = [replace(CELL, seed=5), replace(CELL, defense="bcu")]
    assert estimate(left[:1], [], records) == (20, 0)
    assert estimate(left, [], records) == (40, 1)
    assert estimate(left, [replace(VICTIM, seed=5)], records) == (140, 1)
    assert estimate(left, [], []) == (None, 2)
    assert estimate([], [], []) == (0, 0)
    detects = replace(CELL, detection=DETECTION)
    assert estimate([detects], [], records) == (20, 1)
    records.append(record(detects, 500.0, 100.0))
    assert estimate([CELL, detects], [], records) == (520, 0)
    longer = replace(CELL, settings=(("seed", 0), ("steps", 40)))
    assert estimate([longer], [], records) == (20, 0)  # those of other settings, for want of better
    records.append(record(longer, 90.0, 100.0))
    again = replace(CELL, settings=(("seed", 1), ("steps", 40)), seed=1)
    assert estimate([again], [], records) == (90, 0)
    assert estimate([CELL], [], records) == (20, 0)
    few = record(replace(longer, share=0.01), 15.0, 100.0)
    assert estimate([replace(again, share=0.01), again], [], [*records, few]) == (105, 0)
    clean = replace(CELL, victim=replace(VICTIM, attack="clean"))
    records.append(record(clean, 3.0, 100.0))
    assert estimate([CELL, clean], [], records) == (23, 0)


def test_a_status_tells_done_running_failed_and_left(tmp_path):
    store = open_store(tmp_path)
    cells = [replace(CELL, seed=seed) for seed in range(4)]
    cells.append(replace(CELL, victim=replace(VICTIM, attack="blend"), attack="blend"))
    write_record(store, cells[0].key, record(cells[0], 60.0, 600.0))
    write_failure(store, cells[1].key, "what", "OSError: disk", "Traceback")
    with claimed(store, cells[2].key):
        status = status_of(cells, store)
    assert (status.done, status.left, status.victims_left) == (1, 3, 2)
    assert status.running == ["badnets supervised small, clp, seed 2"]
    assert list(status.failed.values()) == ["OSError: disk"]
    assert status.seconds == pytest.approx(3 * 60 + 2 * 600)
    assert as_lines("grid", status) == [
        "grid: 1 done, 1 running, 1 failed, 3 left with 2 victims to train",
        "  running: badnets supervised small, clp, seed 2",
        "  failed: badnets supervised small, clp, seed 1: OSError: disk",
        "  time left: about 0 h 23 min on one worker",
    ]


def test_a_victim_that_is_given_needs_no_training(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    cells = [CELL, replace(CELL, victim=replace(VICTIM, seed=7))]
    store = open_store(tmp_path)
    assert status_of(cells, store, str(given)).victims_left == 2
    (given / "badnets-supervised-seed7.json").touch()
    assert status_of(cells, store, str(given)).victims_left == 2
    (given / "badnets-supervised-seed7.safetensors").touch()
    assert status_of(cells, store, str(given)).victims_left == 1


def test_nothing_is_estimated_before_the_first_record(tmp_path):
    status = status_of([CELL], open_store(tmp_path))
    assert as_lines("grid", status)[-1] == "  time left: unknown until the first cell is done"
