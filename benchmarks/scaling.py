"""Measure what a second process gives `purify`: one process, one on all processors, and several.

    python benchmarks/scaling.py --out results/scaling.json
    python benchmarks/scaling.py --quick        does it run at all; its numbers mean nothing

On CUDA every process has a device; elsewhere a thread. Each purifies the same images with the
defaults, by the command that a user would type; all take turns (A B A B). A ratio is that to one
process in the same round, of the seconds of the last epoch, without start-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from curves import write_images

from run import ROOT, describe
from unbackdoor.devices import pick_device

VICTIM = ROOT / "results/victims/badnets-supervised-seed0.safetensors"


class Way(NamedTuple):
    """How the same run is started."""

    name: str
    processes: int
    threads: int  # of each


def ways(device: str, processes: int) -> list[Way]:
    """Return the ways to compare; the first is what the others are relative to."""
    one, several = Way("one process", 1, 1), Way(f"{processes} processes", processes, 1)
    if device == "cuda":
        return [one, several]
    return [one, Way(f"one process, {processes} threads", 1, processes), several]


def epoch_seconds(way: Way, purify: list[str], folder: Path) -> float:
    """Run a purification; returns the seconds of its last epoch."""
    out = folder / "out.safetensors"
    start = [sys.executable, "-m"]
    if way.processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={way.processes}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(way.threads)}
    subprocess.run(
        [*start, "unbackdoor", "purify", *purify, "--out", str(out), "--force"],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return float(json.loads(out.with_suffix(".json").read_text())["history"][-1]["seconds"])


def main() -> None:
    """Time all ways in turns, print ratios, write all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="does it run; numbers mean nothing")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=1_280)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device = pick_device("auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count, epochs, repeats = (64, 1, 1) if given.quick else (given.images, 2, given.repeats)
        record: dict[str, Any] = {"on": describe(device), "images": count, "ways": {}}
        source = write_images(folder, count=count, size=32)
        purify = [str(VICTIM), "--arch", "cifar/wrn16_1", "--images", str(source)]
        purify += ["--epochs", str(epochs), "--device", device.type]
        compared = ways(device.type, given.processes)
        seconds: dict[str, list[float]] = {way.name: [] for way in compared}
        for _ in range(repeats):
            for way in compared:
                seconds[way.name].append(epoch_seconds(way, purify, folder))
        alone = seconds[compared[0].name]
        for name, times in seconds.items():
            faster = [one / other for one, other in zip(alone, times, strict=True)]
            record["ways"][name] = {"seconds": times, "faster": faster}
            print(
                f"{name}: an epoch of {count} images {statistics.median(times):.2f} s, "
                f"{statistics.median(faster):.2f} times as fast as one process "
                f"({min(faster):.2f} to {max(faster):.2f})",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
