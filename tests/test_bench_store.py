import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unbackdoor.bench.cells import key_of
from unbackdoor.bench.store import (
    NEEDED,
    SCHEMA,
    SILENT,
    claimed,
    drop_victim,
    forget_failures,
    is_running,
    open_store,
    read_detections,
    read_features,
    read_record,
    read_records,
    release,
    write_failure,
    write_record,
)
from unbackdoor.errors import OutputError

CELL = {"defense": "clp", "seed": 0}
KEY = key_of(CELL)
RECORD = dict.fromkeys(NEEDED) | {"schema": SCHEMA, "cell": CELL}


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "results")


def test_present_means_done_and_nothing_half_written_is_seen(store):
    assert not store.is_done("a")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(store, "a", {"schema": SCHEMA, "acc": float("nan")})
    assert not store.is_done("a")
    assert not list(store.folder.glob(".*"))
    write_record(store, KEY, RECORD)
    assert read_records(store, [KEY, "b"]) == {KEY: RECORD}


def test_a_record_takes_state_and_failure_away(store):
    store.state_path("a").touch()
    write_failure(store, "a", "what", "OSError: disk", "Traceback")
    assert store.error_of("a") == "OSError: disk"
    write_record(store, "a", {"schema": SCHEMA})
    assert store.error_of("a") is None
    assert not store.state_path("a").exists()


def test_failures_are_kept_until_they_are_forgotten(store):
    write_failure(store, "a", "what", "OSError: disk", "Traceback")
    forget_failures(store, ["a", "never failed"])
    assert store.error_of("a") is None


def test_a_damaged_record_and_one_of_another_schema_are_refused(store):
    store.record_path("a").write_text("{")
    with pytest.raises(OutputError, match="is no record"):
        read_record(store.record_path("a"))
    store.record_path("a").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(OutputError, match=f"schema {SCHEMA + 1}, this version reads {SCHEMA}"):
        read_record(store.record_path("a"))
    store.record_path("a").write_text(json.dumps(RECORD))
    with pytest.raises(OutputError, match=f"is the record of {KEY}; delete it"):
        read_record(store.record_path("a"))
    whole = {name: value for name, value in RECORD.items() if name not in ("flags", "seconds")}
    store.record_path(KEY).write_text(json.dumps(whole))
    with pytest.raises(OutputError, match=r"is no record \(it lacks flags, seconds\); delete it"):
        read_record(store.record_path(KEY))
    edited = RECORD | {"cell": {**CELL, "defense": "another"}}
    store.record_path(KEY).write_text(json.dumps(edited))
    with pytest.raises(OutputError, match=r"is the record of \w+; delete it"):
        read_record(store.record_path(KEY))


def test_whatever_else_is_damaged_is_named(store):
    failed = store.folder / "failed" / "a.json"
    for path, look in (
        (failed, lambda: store.error_of("a")),
        (store.features_path("a"), lambda: read_features(store, "a")),
        (store.detections_path("a"), lambda: read_detections(store, "a")),
    ):
        path.write_text("{")
        with pytest.raises(OutputError, match=rf"{path}: is damaged \(.*\); delete it"):
            look()


def test_one_owner_claims_and_another_does_not_until_it_is_free_again(store):
    other = open_store(store.folder)
    with claimed(store, "a") as mine:
        assert mine
        assert is_running(other, "a")
        with claimed(other, "a") as theirs:
            assert not theirs
        assert is_running(other, "a")  # a claim that failed takes nothing away
    with claimed(other, "a") as theirs:
        assert theirs


def test_the_same_owner_takes_its_claim_over(store):
    again = open_store(store.folder, owner=store.owner)
    with claimed(store, "a"), claimed(again, "a") as mine:
        assert mine


def test_the_claim_of_a_dead_process_is_void(store):
    code = (
        "import os, pathlib\n"
        "from unbackdoor.bench.store import claimed, open_store\n"
        f"store = open_store(pathlib.Path({str(store.folder)!r}))\n"
        "with claimed(store, 'a'):\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (store.folder / "running" / "a.json").exists()
    assert not is_running(store, "a")
    with claimed(store, "a") as mine:
        assert mine


def test_another_hosts_claim_is_void_after_a_long_silence(store):
    path = store.folder / "running" / "a.json"
    path.write_text(json.dumps({"owner": "x", "host": f"not {socket.gethostname()}", "pid": 1}))
    assert is_running(store, "a")
    silent = path.stat().st_mtime - SILENT - 1
    os.utime(path, (silent, silent))
    assert not is_running(store, "a")


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="needs Linux")
def test_a_container_that_shares_the_hosts_name_is_another_host(store):
    path = store.folder / "running" / "a.json"
    with claimed(store, "a"):
        claim = json.loads(path.read_text())
        name, space = claim["host"].split(" ")
        assert name == socket.gethostname()
        assert space == str(Path("/proc/self/ns/pid").readlink())
        # Not a process here, but it may be one there.
        path.write_text(json.dumps({**claim, "host": f"{name} pid:[1]", "pid": 2**22 + 1}))
        assert is_running(store, "a")
        path.write_text(json.dumps({**claim, "pid": 2**22 + 1}))
        assert not is_running(store, "a")


def test_the_claims_of_an_owner_who_is_known_to_be_dead_are_given_back(store):
    dead, other = (open_store(store.folder, owner=owner) for owner in ("dead", "other"))
    with claimed(dead, "a"), claimed(dead, "b"), claimed(other, "c"):
        for path in (store.folder / "running").iterdir():  # nobody sees whether it is alive
            path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
        with claimed(store, "a") as mine:
            assert not mine
        assert release(store, "dead") == {"a", "b"}
        with claimed(store, "a") as mine:
            assert mine
        assert is_running(store, "c")


def test_a_claim_gives_signs_of_life_whatever_takes_long_and_then_no_more(store, monkeypatch):
    monkeypatch.setattr("unbackdoor.bench.store.BEAT", 0.01)
    paths = [store.folder / "running" / f"{key}.json" for key in ("a", "b", "c")]
    paths[2].write_text("{}")  # somebody else's
    with claimed(store, "a"), claimed(store, "b"):
        paths[1].unlink()  # by somebody who took it for dead
        for path in (paths[0], paths[2]):
            os.utime(path, (0, 0))
        until = time.monotonic() + 10
        while paths[0].stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert paths[0].stat().st_mtime > time.time() - 60
        assert paths[2].stat().st_mtime == 0
    assert [path.exists() for path in paths] == [False, False, True]
    paths[0].write_text("{}")
    os.utime(paths[0], (0, 0))
    time.sleep(0.1)
    assert paths[0].stat().st_mtime == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(store):
    path = store.folder / "running" / "a.json"
    with claimed(store, "a"):
        claim = json.loads(path.read_text())
    path.write_text(json.dumps({**claim, "owner": "x"}))
    assert is_running(store, "a")  # this very process
    path.write_text(json.dumps({**claim, "owner": "x", "began": "another boot 1"}))
    assert not is_running(store, "a")
    with claimed(store, "a") as mine:
        assert mine


def test_a_claim_that_somebody_took_over_is_left_to_them(store):
    path = store.folder / "running" / "a.json"
    with claimed(store, "a"):
        taken = json.dumps({**json.loads(path.read_text()), "owner": "x"})
        path.write_text(taken)
    assert path.read_text() == taken


def test_a_victim_that_is_dropped_leaves_its_record(store):
    folder = store.victim_folder("v")
    folder.mkdir()
    (folder / "x.safetensors").touch()
    (folder / "x.json").touch()
    drop_victim(store, "v")
    assert [path.name for path in folder.iterdir()] == ["x.json"]


def test_a_file_is_no_folder_of_results(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--results takes a folder"):
        open_store(tmp_path / "file")
