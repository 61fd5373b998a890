import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_measurement_of_speed_runs_and_times_every_part(tmp_path):
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--quick", "--no-rivals"]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=300)
    record = json.loads(out.read_text())
    timed = {part["title"].partition(": ")[2].partition(",")[0]: part for part in record["parts"]}
    assert {"views", "search", "training step", "whole purify"} <= timed.keys()
    for part in record["parts"]:
        assert all(min(row["seconds"]) > 0 for row in part["rows"].values())
    assert min(share["share"] for share in record["shares"]) > 0
