"""Who runs the cells: processes of this machine, or Ray on many.

Either way, workers agree through claims in the folder of records, one victim with all its cells at
a time, so a worker that dies loses nothing but the epoch it was in.
"""

import importlib
import multiprocessing
import os
import socket
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from unbackdoor.bench.cells import Cell, describe
from unbackdoor.bench.obtain import Place, for_any_folder
from unbackdoor.bench.run import Tally, by_victim, pending, run_cells
from unbackdoor.bench.store import Store, open_store, release, write_failure
from unbackdoor.errors import SettingsError
from unbackdoor.types import OnStep, Say

TRIES = 3  # of a cell at which workers die
NOWHERE = ""  # stands for the key of a cell, where a worker was at none when it died
SECONDS_TO_ANSWER = 10  # of the machine that a cluster is said to be on


def run_local(
    cells: Sequence[Cell],
    results: Path,
    place: Place,
    *,
    workers: int = 1,
    say: Say = print,
    on_step: OnStep | None = None,
) -> Tally:
    """Run ``cells`` on this machine, in this process or in ``workers`` others.

    Workers that die are replaced. A cell at which ``TRIES`` have died is recorded as failed; if as
    many die at none, no more are started, and all that is left counts as failed.
    """
    store = open_store(results)
    wanted = pending(cells, store)
    if workers == 1:
        return run_cells(wanted, store, place, say=say, on_step=on_step)
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")

    owners: dict[BaseProcess, str] = {}

    def start() -> BaseProcess:
        owner = os.urandom(8).hex()
        arguments = wanted, results, place, threads
        process = context.Process(target=work, args=arguments, kwargs={"owner": owner})
        process.start()
        owners[process] = owner
        return process

    processes, deaths = [start() for _ in range(workers)], Counter[str]()
    try:
        while processes:
            connection.wait([process.sentinel for process in processes])
            ended = [process for process in processes if process.exitcode is not None]
            processes = [process for process in processes if process not in ended]
            for died in filter(lambda process: process.exitcode != 0, ended):
                left = {cell.key: cell for cell in pending(wanted, store)}
                say(f"a worker died; {len(left)} cells are left")
                died_at = [left[key] for key in release(store, owners[died]) if key in left]
                deaths.update([cell.key for cell in died_at] or [NOWHERE])
                for cell in died_at:
                    if deaths[cell.key] == TRIES:
                        _record_death(cell, store, say)
                if deaths[NOWHERE] < TRIES and pending(wanted, store):
                    processes.append(start())
    except BaseException:  # also an error here: nobody would replace them
        for process in processes:
            process.terminate()
        raise
    if deaths[NOWHERE] < TRIES:
        return _tally(cells, store)
    return _lost(wanted, store, _tally(cells, store), say=say)


def run_ray(
    cells: Sequence[Cell],
    results: Path,
    place: Place,
    *,
    workers: int = 1,
    say: Say = print,
    address: str | None = None,
    gpus: float = 0,
) -> Tally:
    """Run ``cells`` on a Ray cluster: one task a victim, started again where a worker dies.

    Args:
        results: On storage that all machines share, under the same path.
        place: Likewise.
        workers: Processors a task takes.
        address: Of a running cluster, see ``ray.init``; without one, that of the environment
            variable RAY_ADDRESS or the one that runs on this machine, or else one is started here.
        gpus: A task takes.

    Raises:
        SettingsError: If Ray is not installed, or there is no cluster at ``address``.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise SettingsError(
            "--backend ray needs Ray; pip install '.[ray]' where the source is, or pass "
            "--backend local"
        ) from error
    store = open_store(results)
    started = not ray.is_initialized()
    if started:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as error:
            asked = f"--address {address}" if address else f"RAY_ADDRESS={_from_environment()}"
            raise SettingsError(
                f"{asked}: no Ray cluster can be reached ({error}); start one by `ray start "
                "--head` and pass --address auto or the address that it prints, or pass local"
            ) from error
    task = ray.remote(num_cpus=workers, num_gpus=gpus, max_retries=TRIES)(work)
    folder, place = results.resolve(), for_any_folder(place)
    jobs = {}
    for victim, group in by_victim(pending(cells, store)):
        owner = f"{os.urandom(8).hex()}-{victim.key}"
        job = task.remote(group, folder, place, workers, owner=owner)
        jobs[job] = (f"{victim.name}, seed {victim.seed}", group, owner)
    lost: list[Cell] = []
    died: set[str] = set()
    try:
        while jobs:
            (ready,), _ = ray.wait(list(jobs), num_returns=1)
            name, group, owner = jobs.pop(ready)
            try:
                ray.get(ready)
            except ray.exceptions.RayError as error:
                say(f"{name}: given up: {error}")
                lost += group
                died |= release(store, owner)  # also where another machine held them
                continue
            say(f"{name}: finished")
    finally:
        if started:
            ray.shutdown()
    return _lost(lost, store, _tally(cells, store), died=died, say=say)


def _knock(address: str | None) -> None:
    """Raise an OSError where nothing answers at HOST:PORT, which Ray would try for minutes."""
    if address in (None, "auto"):
        address = _from_environment()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER):
            pass


def _from_environment() -> str:
    return os.environ.get("RAY_ADDRESS", "")


def work(
    cells: Sequence[Cell], results: Path, place: Place, threads: int, *, owner: str | None = None
) -> None:
    """Be a worker: run whatever of ``cells`` nobody else is at work on."""
    end_with_parent()
    torch.set_num_threads(threads)  # on a GPU too, for neighbours and images are the CPU's
    run_cells(cells, open_store(results, owner=owner), place)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, also where that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:  # started by Ray, which ends its workers
        return

    def wait() -> None:
        parent.join()
        os._exit(1)  # as if killed too: whatever is written is written whole

    threading.Thread(target=wait, daemon=True).start()


def _lost(
    cells: Iterable[Cell],
    store: Store,
    tally: Tally,
    *,
    died: Collection[str] = (),
    say: Say,
) -> Tally:
    """Count what no worker has finished as failed, and record the cells that they died at.

    Args:
        died: Keys of those at which workers died.
    """
    left = pending(cells, store)
    for cell in left:
        if cell.key in died:
            _record_death(cell, store, say)
    return tally._replace(failed=tally.failed + len(left), left=tally.left - len(left))


def _record_death(cell: Cell, store: Store, say: Say) -> None:
    write_failure(store, cell.key, describe(cell), "its worker died, again and again", "")
    say(f"failed: {describe(cell)}: its worker died, again and again")


def _tally(cells: Sequence[Cell], store: Store) -> Tally:
    keys = {cell.key for cell in cells}
    done = sum(store.is_done(key) for key in keys)
    failed = sum(store.error_of(key) is not None for key in keys)
    return Tally(done, failed, len(keys) - done - failed)
