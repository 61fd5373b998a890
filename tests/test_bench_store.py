import json
import os
import socket
import subprocess
import sys

import pytest

from unbackdoor.bench.store import (
    SCHEMA,
    SILENT,
    beat,
    claimed,
    drop_victim,
    forget_failures,
    is_running,
    open_store,
    read_record,
    read_records,
    write_failure,
    write_record,
)
from unbackdoor.errors import OutputError


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "results")


def test_present_means_done_and_nothing_half_written_is_seen(store):
    assert not store.is_done("a")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(store, "a", {"schema": SCHEMA, "acc": float("nan")})
    assert not store.is_done("a")
    assert not list(store.folder.glob(".*"))
    write_record(store, "a", {"schema": SCHEMA, "acc": 0.5})
    assert read_records(store, ["a", "b"]) == {"a": {"schema": SCHEMA, "acc": 0.5}}


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
    beat(store, "a")  # a sign of life
    assert is_running(store, "a")
    beat(store, "of nobody")


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
