"""The folder of records: what is done, what failed, who is at work on what.

::

    RESULTS/KEY.json            a record; written by rename, so present means done
    RESULTS/failed/KEY.json     the error of a cell that failed
    RESULTS/running/KEY.json    a claim: who is at work on a cell or a victim
    RESULTS/victims/KEY/        a victim and its record
    RESULTS/states/KEY.*        the last finished epoch of a repair, see ``repair_key``; of a cell
                                its repaired backbone, and the detector that is trained on it
    RESULTS/features/KEY.json   features before and after, which the report draws
    RESULTS/features/KEY.*.json likewise: test images, clean and triggered, and what detectors find

Only the records and features are worth keeping in git; images belong to others.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.bench.cells import key_of
from unbackdoor.checkpoint import write_text
from unbackdoor.errors import OutputError

SCHEMA = 1
SCORING = 2  # 1, where records do not say: a probe stopped earlier, images in their own order
NEEDED = (  # of a record, by its readers
    *("cell", "victim", "scores", "data", "flags", "seconds"),
    *("device", "precision", "versions", "revision"),
)
SILENT = 600.0  # seconds without a sign of life, after which another host's claim is void
BEAT = 20.0  # seconds between signs of life


@dataclass(frozen=True)
class Store:
    """A folder of records.

    Attributes:
        folder: On storage that all machines at work share.
        owner: Who claims: a second claim by the same owner succeeds, so that work that a scheduler
            starts again after a crash goes on.
    """

    folder: Path
    owner: str

    def record_path(self, key: str) -> Path:
        """Of a finished cell."""
        return self.folder / f"{key}.json"

    def victim_folder(self, key: str) -> Path:
        """Of a victim that was trained here."""
        return self.folder / "victims" / key

    def state_path(self, key: str) -> Path:
        """Of a repair at work."""
        return self.folder / "states" / f"{key}.safetensors"

    def defended_path(self, key: str) -> Path:
        """Of what is recorded of a cell before its detector is trained."""
        return self.folder / "states" / f"{key}.defended.json"

    def backbone_path(self, key: str) -> Path:
        """Of what a cell's detector is trained on."""
        return self.folder / "states" / f"{key}.backbone.safetensors"

    def detector_path(self, key: str) -> Path:
        """Of a cell's detector; its state and its record lie beside."""
        return self.folder / "states" / f"{key}.detector.safetensors"

    def features_path(self, key: str) -> Path:
        """Of the features before and after a cell."""
        return self.folder / "features" / f"{key}.json"

    def images_path(self, key: str) -> Path:
        """Of some test images, clean and triggered."""
        return self.folder / "features" / f"{key}.images.json"

    def detections_path(self, key: str) -> Path:
        """Of the pictures of what a cell's detector finds."""
        return self.folder / "features" / f"{key}.detections.json"

    def is_done(self, key: str) -> bool:
        """Tell whether a cell has its record."""
        return self.record_path(key).is_file()

    def error_of(self, key: str) -> str | None:
        """Return why a cell failed; None if it did not, or is done by now.

        Raises:
            OutputError: If that cannot be read.
        """
        path = self.folder / "failed" / f"{key}.json"
        if self.is_done(key) or not path.is_file():
            return None
        return str(_read_json(path)["error"])


def open_store(folder: Path, *, owner: str | None = None) -> Store:
    """Return the store in ``folder``, which is made if absent.

    Raises:
        OutputError: If ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; --results takes a folder")
    for part in ("", "failed", "running", "victims", "states", "features"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return Store(folder, owner or secrets.token_hex(8))


def look_at(folder: Path) -> Store:
    """Return the store in ``folder`` to read from; nothing is made."""
    return Store(folder, "")


def write_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write JSON, whole or not at all; errors are those of :func:`write_text`."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n", overwrite=True)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        OutputError: If it is damaged, of another schema, or of another cell.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema = record["schema"]
        lacking = [name for name in NEEDED if name not in record]
        if schema == SCHEMA and lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: is no record ({error}); delete it to run it again") from error
    if schema != SCHEMA:
        raise OutputError(
            f"{path}: is of schema {schema}, this version reads {SCHEMA}; delete it to run it again"
        )
    if (found := key_of(record["cell"])) != path.stem:
        raise OutputError(f"{path}: is the record of {found}; delete it to run its own cell again")
    return dict(record)


def read_records(store: Store, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the records that there are, by key; errors are those of :func:`read_record`."""
    return {key: read_record(store.record_path(key)) for key in keys if store.is_done(key)}


def read_features(store: Store, key: str) -> dict[str, Any] | None:
    """Return what ``cell_features`` kept of a cell, and what ``cell_images`` did as ``attack``.

    None if the former was not kept; without ``attack`` if the latter was not.
    """
    path, images = store.features_path(key), store.images_path(key)
    if not path.is_file():
        return None
    features = _read_json(path)
    return features | ({"attack": _read_json(images)} if images.is_file() else {})


def read_detections(store: Store, key: str) -> list[dict[str, Any]]:
    """Return the pictures of what a cell's detector finds; none if they were not kept."""
    path = store.detections_path(key)
    return list(_read_json(path)["pictures"]) if path.is_file() else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path}: is damaged ({error}); delete it") from error


def write_record(store: Store, key: str, record: Mapping[str, Any]) -> None:
    """Write the record of a finished cell, then forget its states and its earlier failure."""
    write_json(store.record_path(key), record)
    for path in (store.folder / "states").glob(f"{key}.*"):
        path.unlink(missing_ok=True)
    (store.folder / "failed" / f"{key}.json").unlink(missing_ok=True)


def write_failure(store: Store, key: str, what: str, error: str, trace: str) -> Path:
    """Write why a cell failed; returns where."""
    path = store.folder / "failed" / f"{key}.json"
    write_json(path, {"what": what, "error": error, "traceback": trace})
    return path


def forget_failures(store: Store, keys: Iterable[str]) -> None:
    """Let cells that failed be run again."""
    for key in keys:
        (store.folder / "failed" / f"{key}.json").unlink(missing_ok=True)


def drop_victim(store: Store, key: str) -> None:
    """Delete the weights of a victim that was trained here; its record stays."""
    for path in store.victim_folder(key).glob("*.safetensors"):
        path.unlink(missing_ok=True)  # others may drop it as well


@contextmanager
def claimed(store: Store, key: str) -> Iterator[bool]:
    """Claim a cell or a victim while inside; yields whether nobody else has it.

    A thread gives a sign of life every ``BEAT`` seconds, whatever takes long inside.
    """
    path = store.folder / "running" / f"{key}.json"
    if not _claim(store, path):
        yield False
        return
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended, BEAT), daemon=True).start()
    try:
        yield True
    finally:
        ended.set()
        if (_read_claim(path) or {}).get("owner") == store.owner:  # nobody took it for dead
            path.unlink(missing_ok=True)


def is_running(store: Store, key: str) -> bool:
    """Tell whether somebody alive has claimed ``key``."""
    return _alive(store.folder / "running" / f"{key}.json") is not None


def release(store: Store, owner: str) -> set[str]:
    """Give back all claims of ``owner``, who is known to be dead; returns their keys."""
    claims = (store.folder / "running").glob("*.json")
    of_owner = [path for path in claims if (_read_claim(path) or {}).get("owner") == owner]
    for path in of_owner:
        path.unlink(missing_ok=True)
    return {path.stem for path in of_owner}


def _beat(path: Path, ended: threading.Event, seconds: float) -> None:
    while not ended.wait(seconds):
        with suppress(OSError):  # it was taken for dead, or the storage is away
            os.utime(path)


def _claim(store: Store, path: Path) -> bool:
    claim = {
        "owner": store.owner,
        "host": _host(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
    }
    holder = _alive(path)
    if holder is not None and holder.get("owner") != store.owner:
        return False
    if holder is None and path.exists():
        path.unlink(missing_ok=True)  # at worst two claim, and one record is written twice
    elif holder is not None:
        write_json(path, claim)
        return True
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
    temporary.write_text(json.dumps(claim))
    try:
        os.link(temporary, path)  # fails where the name exists: one claims, whole or not at all
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _alive(path: Path) -> dict[str, Any] | None:
    """Return the claim in ``path`` if there is one and its process is alive, as far as one sees."""
    claim = _read_claim(path)
    if claim is None:
        return None
    if claim["host"] == _host():
        return claim if _runs(int(claim["pid"]), claim.get("began")) else None
    try:
        return claim if time.time() - path.stat().st_mtime < SILENT else None
    except OSError:
        return None


def _read_claim(path: Path) -> dict[str, Any] | None:
    try:
        claim = dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
    return claim if {"owner", "host", "pid"} <= claim.keys() else None


def _host() -> str:
    """Return what all processes have in common that know each other by number.

    Containers may share their host's name, and each counts its own processes.
    """
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _runs(pid: int, began: str | None) -> bool:
    """Tell whether the process of a claim runs; another one may have its number by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _began(pid)
    return began is None or now is None or began == now


def _began(pid: int) -> str | None:
    """Return when a process began, as Linux counts it since a boot that it names; else None."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {words[19]}"  # field 22 of proc(5), of which two go before the bracket
