import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from unbackdoor.bench.backends import run_local, run_ray, work
from unbackdoor.bench.cells import Cell
from unbackdoor.bench.grid import entries, read_grid, unique_cells
from unbackdoor.bench.obtain import Place
from unbackdoor.bench.store import look_at, open_store
from unbackdoor.errors import SettingsError

GRID = """
table = "1"
tier = "smoke"
data = "{data}"
arch = "cifar/wrn16_1"
size = 8
target = 1
preset = "cpu"
attacks = ["badnets"]
seeds = [0]

[victim]
epochs = 2
batch_size = 50
augment = "none"

[cbd]
epochs = 30
batch_size = 8
changes = {{ patches = 1, warps = 3, steps = 1 }}

[[rows]]
name = "No Defense"
defense = "none"

[[rows]]
name = "CBD"
defense = "cbd"
"""
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture
def cells(tmp_path):
    """Three cells of two victims, of which one takes long enough to be killed in."""
    for split, count in (("train", 200), ("test", 10)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "shades" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                level = 40 + 120 * label + i % 80
                Image.new("RGB", (8, 8), (level, 90, level)).save(folder / f"{i:03}.png")
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(data=tmp_path / "shades"))
    return unique_cells(entries(read_grid(path)))


@pytest.fixture
def place(tmp_path):
    return Place(str(tmp_path / "shades"), device="cpu")


def slow_one(cells: list[Cell]) -> Cell:
    return next(cell for cell in cells if cell.defense == "cbd")


def kill_in(cell: Cell, results: Path, *, limit: float = 300) -> int:
    """Kill whoever is at work on ``cell`` after an epoch of it; returns the process."""
    claim, state = results / "running" / f"{cell.key}.json", look_at(results).state_path(cell.key)
    until = time.monotonic() + limit
    while not (claim.exists() and state.exists()):
        assert time.monotonic() < until, "nobody got that far"
        time.sleep(0.02)
    pid = int(claim.read_text().partition('"pid": ')[2].partition("}")[0].partition(",")[0])
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_claim_of_the_dead_is_taken_over_and_nothing_is_lost(cells, place, tmp_path):
    results = tmp_path / "results"
    open_store(results)
    wanted = [cell for cell in cells if cell.victim.attack == "badnets"]
    worker = multiprocessing.get_context("spawn").Process(
        target=work, args=(wanted, results, place, 1)
    )
    worker.start()
    assert kill_in(slow_one(cells), results) == worker.pid
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    first = next(cell for cell in wanted if cell.defense == "none")
    before = look_at(results).record_path(first.key).stat().st_mtime_ns

    tally = run_local(wanted, results, place, say=lambda line: None)
    assert tally.done == 1  # the other one was done
    assert all(look_at(results).is_done(cell.key) for cell in wanted)
    assert look_at(results).record_path(first.key).stat().st_mtime_ns == before


@pytest.mark.slow
def test_several_workers_share_the_victims_and_replace_the_one_that_dies(cells, place, tmp_path):
    results, said = tmp_path / "results", []
    open_store(results)
    killer = multiprocessing.get_context("spawn").Process(
        target=kill_in, args=(slow_one(cells), results)
    )
    killer.start()
    tally = run_local(cells, results, place, workers=2, say=said.append)
    killer.join(10)
    killer.terminate()  # had there been nobody to kill
    assert killer.exitcode == 0
    assert (tally.done, tally.failed, tally.left) == (3, 0, 0)
    assert "a worker died" in said[0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_the_process_that_started_them(cells, place, tmp_path):
    results = tmp_path / "results"
    open_store(results)
    context = multiprocessing.get_context("spawn")
    parent = context.Process(
        target=run_local, args=(cells, results, place), kwargs={"workers": 2, "say": print}
    )
    parent.start()
    claim = results / "running" / f"{slow_one(cells).key}.json"
    until = time.monotonic() + 200
    while not claim.exists():
        assert time.monotonic() < until, "nobody got that far"
        time.sleep(0.02)
    worker = json.loads(claim.read_text())["pid"]
    assert worker != parent.pid
    parent.terminate()
    parent.join()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < until, "the worker goes on"
        time.sleep(0.05)
    assert not look_at(results).is_done(slow_one(cells).key)


def dies(backbone, data, settings, *, device="cpu", on_step=None):
    """Stand for a defense for which a machine has no memory."""
    os._exit(9)


@pytest.mark.slow
def test_a_cell_at_which_workers_die_again_and_again_has_failed(cells, place, tmp_path):
    path, results, said = tmp_path / "grid.toml", tmp_path / "results", []
    row = f'[[rows]]\nname = "dies"\ndefense = "{Path(__file__).resolve()}:dies"\n'
    kept, _, _ = path.read_text().partition('[[rows]]\nname = "CBD"')
    path.write_text(kept + row)
    grid = read_grid(path)
    wanted = unique_cells(entries(grid))
    own = place._replace(own=tuple(row.defense for row in grid.rows))
    tally = run_local(wanted, results, own, workers=2, say=said.append)
    assert (tally.done, tally.failed, tally.left) == (2, 1, 0)
    (dead,) = [cell for cell in wanted if cell.defense not in ("none", "clean")]
    assert look_at(results).error_of(dead.key) == "its worker died, again and again"
    assert "dies" in said[-1]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; pip install '.[ray]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_ray_starts_a_killed_worker_again_and_nothing_is_lost(cells, place, tmp_path, monkeypatch):
    results = tmp_path / "results"
    open_store(results)
    killer = multiprocessing.get_context("spawn").Process(
        target=kill_in, args=(slow_one(cells), results)
    )
    killer.start()
    said = []
    monkeypatch.chdir(tmp_path)  # workers of a cluster run elsewhere, so that paths are made whole
    tally = run_ray(cells, Path("results"), place._replace(data="shades"), say=said.append)
    killer.join(10)
    killer.terminate()  # had there been nobody to kill
    assert killer.exitcode == 0, said
    assert (tally.done, tally.failed, tally.left) == (3, 0, 0)


def test_without_ray_its_backend_says_what_to_install(cells, place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(SettingsError, match=r"pip install '.\[ray\]'"):
        run_ray(cells, tmp_path / "results", place)
