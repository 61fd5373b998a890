import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import GRID_HEAD

from unbackdoor.bench.backends import run_local, run_ray, work
from unbackdoor.bench.cells import Cell
from unbackdoor.bench.grid import entries, read_grid, unique_cells
from unbackdoor.bench.obtain import Place, for_any_folder
from unbackdoor.bench.run import repair_key
from unbackdoor.bench.store import is_running, look_at, open_store
from unbackdoor.errors import SettingsError

GRID = (
    GRID_HEAD
    + """
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
)
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture
def cells(data, tmp_path):
    """Three cells of two victims, of which one takes long enough to be killed in."""
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(data=data))
    return unique_cells(entries(read_grid(path)))


@pytest.fixture
def place(data):
    return Place(data, device="cpu")


def slow_one(cells: list[Cell]) -> Cell:
    return next(cell for cell in cells if cell.defense == "cbd")


def wait_in(cell: Cell, results: Path, *, limit: float = 300) -> int:
    """Wait until somebody at work on ``cell`` has finished an epoch of it; returns the process."""
    claim = results / "running" / f"{cell.key}.json"
    state = look_at(results).state_path(repair_key(cell))
    until = time.monotonic() + limit
    while not (claim.exists() and state.exists()):
        assert time.monotonic() < until, "nobody got that far"
        time.sleep(0.02)
    return int(json.loads(claim.read_text())["pid"])


def kill_in(cell: Cell, results: Path) -> int:
    """Kill whoever is at work on ``cell`` after an epoch of it; returns the process."""
    pid = wait_in(cell, results)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.slow
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
def test_workers_end_with_the_run_that_started_them(cells, place, tmp_path):
    results = tmp_path / "results"
    open_store(results)
    run = multiprocessing.get_context("spawn").Process(
        target=run_local, args=(cells, results, place), kwargs={"workers": 2}
    )
    run.start()
    worker, key = wait_in(slow_one(cells), results), slow_one(cells).key
    assert worker != run.pid
    assert is_running(look_at(results), key)
    run.terminate()
    run.join()
    assert run.exitcode == -signal.SIGTERM
    until = time.monotonic() + 60
    while is_running(look_at(results), key):
        assert time.monotonic() < until, "the worker goes on"
        time.sleep(0.02)
    assert not look_at(results).is_done(key)


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


def test_a_place_that_is_sent_elsewhere_has_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    here = Place("shades", victims="../v", start="w.pt", own=("x/mine.py:mine",), features=("k",))
    assert for_any_folder(here) == Place(
        f"{tmp_path}/shades",
        victims=f"{tmp_path}/../v",
        start=f"{tmp_path}/w.pt",
        own=(f"{tmp_path}/x/mine.py:mine",),
        features=("k",),
    )
    for data, absolute in (
        ("cifar10:images", f"cifar10:{tmp_path}/images"),
        ("a:b", f"{tmp_path}/a:b"),
        ("fashion-mnist", "fashion-mnist"),
        ("/data/shades", "/data/shades"),
    ):
        assert for_any_folder(Place(data)) == Place(absolute)
    assert for_any_folder(Place("", detection="voc:cells")).detection == f"voc:{tmp_path}/cells"


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
def test_ray_starts_a_killed_worker_again_and_nothing_is_lost(cells, place, tmp_path):
    results = tmp_path / "results"
    open_store(results)
    killer = multiprocessing.get_context("spawn").Process(
        target=kill_in, args=(slow_one(cells), results)
    )
    killer.start()
    said = []
    tally = run_ray(cells, results, place, address="local", say=said.append)
    killer.join(10)
    killer.terminate()  # had there been nobody to kill
    assert killer.exitcode == 0, said
    assert (tally.done, tally.failed, tally.left) == (3, 0, 0)


DIES_ELSEWHERE = """
import json, os
from pathlib import Path

def dies(backbone, data, settings, *, device="cpu", on_step=None):
    for path in Path({running!r}).glob("*.json"):
        claim = json.loads(path.read_text())
        if claim["pid"] == os.getpid():
            path.write_text(json.dumps({{**claim, "host": "elsewhere"}}))
    os._exit(9)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; pip install '.[ray]'")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
def test_a_cell_at_which_workers_of_other_machines_die_has_failed_too(
    cells, data, tmp_path, monkeypatch
):
    path, results = tmp_path / "grid.toml", tmp_path / "results"
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "dies.py").write_text(DIES_ELSEWHERE.format(running=str(results / "running")))
    kept, _, _ = path.read_text().partition("[[rows]]")
    path.write_text(f'{kept}[[rows]]\nname = "dies"\ndefense = "dies.py:dies"\n')
    monkeypatch.chdir(tmp_path)
    (dead,) = [e.cell for e in entries(read_grid(Path("grid.toml"))) if e.row == "dies"]
    said = []
    tally = run_ray(
        [dead],
        results,
        Place("data", device="cpu", own=("dies.py:dies",)),
        address="local",
        say=said.append,
    )
    assert (tally.done, tally.failed, tally.left) == (0, 1, 0), said
    assert look_at(results).error_of(dead.key) == "its worker died, again and again"
    assert not any((results / "running").iterdir())


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; pip install '.[ray]'")
@pytest.mark.timeout(90)  # Ray itself would try for minutes
@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_told(address, cells, place, tmp_path):
    with pytest.raises(SettingsError, match=f"--address {address}: no Ray cluster can be reached"):
        run_ray(cells, tmp_path / "results", place, address=address)


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; pip install '.[ray]'")
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("given", "told"), [(None, "RAY_ADDRESS=127.0.0.1:1"), ("auto", "--address auto")]
)
def test_a_cluster_that_the_environment_names_in_vain_is_told(
    given, told, cells, place, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SettingsError, match=f"{told}: no Ray cluster can be reached"):
        run_ray(cells, tmp_path / "results", place, address=given)


def test_without_ray_its_backend_says_what_to_install(cells, place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(SettingsError, match=r"pip install '.\[ray\]'"):
        run_ray(cells, tmp_path / "results", place)
