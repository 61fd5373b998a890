"""Measure what `purify` costs against the number of images, their size, batch and search.

    python benchmarks/curves.py --out results/curves.json
    python benchmarks/curves.py --quick        does it run at all; its numbers mean nothing

Every point is a process of its own, so that its peak memory is its own. It purifies with the
defaults, changed in one thing, and stops after some steps. Images are noise in JPEG files, in a
parquet file on disk.
"""

import argparse
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import parquet

from run import describe
from unbackdoor.backbones import Backbone, build
from unbackdoor.cbd import purify
from unbackdoor.data import load_images
from unbackdoor.devices import peak_memory, pick_device
from unbackdoor.settings import ChangeSettings, PurifySettings

DISTINCT = 1_000  # files that are different; larger sources repeat them
UNITS = {
    "images": "images",
    "size": "side in pixels (ResNet-18)",
    "batch": "images a batch",
    "steps of learning": "steps of learning an epoch",
}
DRAWN = (("epoch", "seconds an epoch", 1), ("memory", "peak memory, GiB", 2**30))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Figures = dict[str, float]


class Point(NamedTuple):
    """What is measured: the defaults, changed in one thing."""

    curve: str
    images: int = 2_500
    arch: str = "cifar/wrn16_1"
    size: int = 32
    batch_size: int = 64
    steps: int = 40  # with which changes are learned at the start of an epoch

    @property
    def value(self) -> int:
        """What the curve runs along."""
        along = {"batch": "batch_size", "steps of learning": "steps"}.get(self.curve, self.curve)
        return int(getattr(self, along))


POINTS = (
    *(Point("images", images=count) for count in (2_500, 25_000, 250_000, 1_000_000)),
    *(Point("size", arch="timm/resnet18", size=side, steps=4) for side in (32, 64, 128, 224)),
    *(Point("batch", batch_size=count) for count in (16, 32, 64, 128, 256)),
    *(Point("steps of learning", steps=count) for count in (10, 20, 40, 80)),
)
QUICK = (Point("images", images=200, batch_size=14, steps=1), Point("size", size=16, steps=1))


class EnoughError(Exception):
    """Enough steps have been timed."""


def write_images(folder: Path, *, count: int, size: int) -> Path:
    """Write a parquet file of noise in JPEG files, as on the Hugging Face hub; returns its path."""
    path = folder / f"{count}-{size}.parquet"
    if path.exists():
        return path
    generator = np.random.default_rng(0)
    files = []
    for _ in range(min(count, DISTINCT)):
        image = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        image.save(file := io.BytesIO(), "JPEG")
        files.append({"bytes": file.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind)])
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, count, DISTINCT):
            part = pa.array(files[: count - first], kind)
            writer.write_table(pa.table([part], schema))
    return path


def measure(point: Point, source: Path, *, timed: int) -> Figures:
    """Purify until ``timed`` steps have been timed; returns seconds, and peak memory in bytes."""
    device = pick_device("auto")
    built = build(point.arch, classes=10)
    mean, std = IMAGENET
    network = Backbone(built.network, built.heads, mean=mean, std=std).eval()
    settings = PurifySettings(
        batch_size=point.batch_size, changes=replace(ChangeSettings(), steps=point.steps)
    )
    begun = time.perf_counter()
    images = load_images(source, size=point.size)
    loaded = time.perf_counter()
    ticks: list[float] = []

    def on_step(done: int, steps: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())
        if done > timed:
            raise EnoughError

    try:
        purify(network, images, settings, device=device, on_step=on_step)
    except EnoughError:
        pass
    else:
        raise SystemExit(f"{len(images)} images are too few for {timed} steps")
    step = statistics.median(after - before for before, after in itertools.pairwise(ticks))
    start = ticks[0] - loaded - step  # copies, features of plain images, the changes of an epoch
    per_epoch = point.images // point.batch_size
    return {
        "index": loaded - begun,
        "start": start,
        "step": step,
        "epoch": start + per_epoch * step,
        "memory": peak_memory(device),
    }


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds of an epoch and the peak memory along every curve, as SVG."""
    curves = {name: [p for p in points if p["curve"] == name] for name in UNITS}
    curves = {name: along for name, along in curves.items() if along}
    figure = Figure((10, 4.5), layout="constrained")
    panels = figure.subplots(2, len(curves), sharex="col", squeeze=False)
    for column, (name, along) in enumerate(curves.items()):
        for row, (what, label, unit) in enumerate(DRAWN):
            axes = panels[row, column]
            axes.plot([p["value"] for p in along], [p[what] / unit for p in along], "o-")
            axes.set_xscale("log")
            if name == "images" and what == "epoch":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(label)
        axes.set_xlabel(UNITS[name])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure every point, print it, write all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="does it run; numbers mean nothing")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--plot", type=Path, help="where to draw it, as SVG")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--timed", type=int, default=8, help="steps of each point")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.point:
        point = Point(**json.loads(given.point))
        print(json.dumps(measure(point, given.source, timed=given.timed)))
        return
    record: dict[str, Any] = {"on": describe(pick_device("auto")), "points": []}
    again = [
        word
        for name in ("threads", "timed")
        if (value := getattr(given, name))
        for word in (f"--{name}", str(value))
    ]
    with tempfile.TemporaryDirectory() as folder:
        for point in QUICK if given.quick else POINTS:
            source = write_images(Path(folder), count=point.images, size=point.size)
            words = ["--point", json.dumps(point._asdict()), "--source", str(source), *again]
            done = subprocess.run(
                [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
            )
            figures: Figures = json.loads(done.stdout)
            record["points"].append({**point._asdict(), "value": point.value, **figures})
            print(
                f"{point.curve} {point.value:,}: index {figures['index']:.2f} s, an epoch's start "
                f"{figures['start']:.1f} s, a step {figures['step']:.3f} s, "
                f"an epoch {figures['epoch']:.0f} s, {figures['memory'] / 2**20:.0f} MiB",
                flush=True,
            )
    if given.plot:
        draw(record["points"], given.plot)
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
