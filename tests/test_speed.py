import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONE = ("--threads", "1")  # beside other tests, several threads wait for each other


@pytest.mark.slow
def test_the_measurement_of_speed_runs_and_times_every_part(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--quick", *ONE]
    parts = ["views", "search", "training", "whole", "variants", "victims"]  # no downloads
    subprocess.run([*command, "--out", str(out), "--only", *parts], check=True)
    record = json.loads(out.read_text())
    timed = {part["title"].partition(": ")[2].partition(",")[0]: part for part in record["parts"]}
    assert {"views", "search", "training step", "whole purify"} <= timed.keys()
    assert "training a victim with labels" in timed
    for part in record["parts"]:
        assert all(min(row["seconds"]) > 0 for row in part["rows"].values())
    assert min(share["share"] for share in record["shares"]) > 0


@pytest.mark.slow
def test_a_device_that_is_right_is_found_to_be():
    command = [sys.executable, str(ROOT / "benchmarks/check_device.py"), "cpu", "cifar/wrn16_1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "wrong" not in run.stdout
    for what in ("trigger wanet", "gradients", "resumed", "search of 20 steps", "views of 128"):
        assert what in run.stdout


@pytest.mark.slow
def test_the_measurement_of_several_processes_times_every_way(tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True)
    ways = json.loads(out.read_text())["ways"]
    assert {"one process", "2 processes"} <= ways.keys()
    alone = ways["one process"]["seconds"]
    for way in ways.values():
        assert way["faster"] == [
            one / other for one, other in zip(alone, way["seconds"], strict=True)
        ]


@pytest.mark.slow
def test_the_measurement_of_costs_runs_and_draws_its_curves(tmp_path):
    out, plot = tmp_path / "curves.json", tmp_path / "curves.svg"
    command = [sys.executable, str(ROOT / "benchmarks/curves.py"), "--quick", *ONE]
    command += ["--timed", "2", "--out", str(out), "--plot", str(plot)]
    subprocess.run(command, check=True)
    points = json.loads(out.read_text())["points"]
    assert [(point["curve"], point["value"]) for point in points] == [("images", 200), ("size", 16)]
    for point in points:
        assert 0 < point["step"] < point["start"] < point["epoch"]
        assert point["memory"] > 2**27
    assert plot.read_text().count("<svg") == 1
