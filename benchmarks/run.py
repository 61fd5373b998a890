"""Measure how fast the purification is, against plain loops and other libraries, in one run.

    python benchmarks/run.py --data cifar10:DIR --out speed.json
    python benchmarks/run.py --quick        does it run at all; its numbers mean nothing

What is compared is timed in turns (A B A B), so that whatever else the machine does meets all
alike; a ratio is the median over these rounds, with its lowest and highest. docs/speed.md says
what each number is.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import plain
import torch
from plain import CAREFUL, PLAIN, Habits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor import cbd
from unbackdoor.backbones import Backbone, Classifier, build, load_backbone
from unbackdoor.batchnorm import fold
from unbackdoor.data import load_images
from unbackdoor.devices import (
    Precision,
    compile_for_search,
    flops,
    frozen_twin,
    in_precision,
    matrix_limit,
    peak_memory,
    pick_device,
    pick_precision,
)
from unbackdoor.pgd import linf_pgd
from unbackdoor.settings import PurifySettings, SearchSettings, VictimSettings, purify_preset
from unbackdoor.victims import train_supervised
from unbackdoor.views import random_views

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VICTIMS = {"cifar/wrn16_1": ROOT / "results/victims/badnets-supervised-seed0.safetensors"}
RIVALS = {  # without their dependencies: those, PyTorch above all, are shared with ours
    "art": ["adversarial-robustness-toolbox==1.20.1", "six==1.17.0"],
    "torchattacks": [
        *("torchattacks==3.5.1", "requests==2.25.1", "urllib3==1.26.20"),
        *("chardet==4.0.0", "idna==2.10"),
    ],
}
PAPER = replace(purify_preset("cifar10"), batch_norm="reference")  # 15 epochs, batches of 128
PAPERS_IMAGES = 2_500

PARTS = ("views", "search", "training", "whole", "variants", "rivals", "victims")

Measure = Callable[[], float]  # runs once and returns the seconds


class Variant(NamedTuple):
    """How ours is run."""

    precision: Precision
    layout: torch.memory_format
    folded: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        """Return a short name."""
        channels_last = self.layout == torch.channels_last
        flags = {"channels-last": channels_last, "folded": self.folded, "compiled": self.compiled}
        return " ".join([self.precision, *(name for name, on in flags.items() if on)])


@dataclass
class Bench:
    """What all parts of a run share."""

    device: torch.device
    settings: PurifySettings
    images: Tensor  # uint8, of the batches of a whole purify
    repeats: int
    workers: int
    ends: float  # on the monotonic clock
    only: tuple[str, ...]  # of PARTS
    parts: int  # that are still to come, for their share of the time
    record: dict[str, Any]
    folder: Path  # for what is needed meanwhile
    out: Path | None  # the record's

    def clocked(self, work: Callable[[], Any]) -> Measure:
        """Return a measure of ``work``, on a device that has nothing else to do."""

        def measure() -> float:
            wait(self.device)
            started = time.perf_counter()
            work()
            wait(self.device)
            return time.perf_counter() - started

        return measure

    def alternate(self, measures: dict[str, Measure]) -> dict[str, list[float]]:
        """Time all in turns, ``repeats`` times or until this part's share of the budget is spent.

        Each runs once before, unmeasured.
        """
        share = max(0.0, self.ends - time.monotonic()) / max(1, self.parts)
        self.parts -= 1
        stop = time.monotonic() + share
        for measure in measures.values():
            measure()
        seconds: dict[str, list[float]] = {name: [] for name in measures}
        while len(next(iter(seconds.values()))) < self.repeats:
            for name, measure in measures.items():
                seconds[name].append(measure())
            if time.monotonic() > stop:
                break
        return seconds

    def compare(
        self,
        part: str,
        title: str,
        measures: dict[str, Measure],
        *,
        items: float,
        unit: str,
        **facts: Any,
    ) -> dict[str, list[float]]:
        """Time all in turns, print rates and how much faster the first is, and note them."""
        if part not in self.only:
            return {}
        if time.monotonic() > self.ends:
            print(f"\n{title}: left out, the budget is spent; raise --budget")
            return {}
        seconds = self.alternate(measures)
        first = next(iter(measures))
        rounds = len(seconds[first])
        print(f"\n{title}: rate, and time relative to {first}, in {rounds} rounds")
        rows = {}
        for name, times in seconds.items():
            ratios = [one / ours for one, ours in zip(times, seconds[first], strict=True)]
            rate = items / statistics.median(times)
            rows[name] = {
                "seconds": times,
                "rate": rate,
                "unit": unit,
                "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            }
            middle, low, high = rows[name]["ratio"]
            print(f"  {name:42} {rate:12.1f} {unit:22} {middle:7.2f} ({low:.2f} to {high:.2f})")
        self.record["parts"].append({"title": title, "ratio to": first, "rows": rows, **facts})
        self.write()
        return seconds

    def write(self) -> None:
        """Write what has been measured so far, for a machine may be lent for minutes."""
        if self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=1) + "\n")


def wait(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def search_flops(network: nn.Module, images: Tensor, steps: int) -> float:
    """Return the operations of our search; the gradient of a layer's input costs as a pass does."""
    return flops(network, images[:1]) * len(images) * (1 + 2 * steps)  # 1: the anchor


def training_flops(network: nn.Module, images: Tensor) -> float:
    """Return the operations of our training step, likewise; gradients of weights cost as much."""
    passes = 3 * 3 + 1  # three views there and back twice, the original
    return flops(network, images[:1]) * len(images) * passes


def compare_network(bench: Bench, arch: str, backbone: Backbone) -> None:
    """Compare views, search, training and the whole purify of one network."""
    device, settings = bench.device, bench.settings
    size, steps = settings.batch_size, settings.search.steps
    precision = pick_precision("auto", device)  # as purify does, for its search and its training
    original = copy.deepcopy(backbone).to(device).eval().requires_grad_(False)
    students = {who: copy.deepcopy(original).requires_grad_(True) for who in ("ours", "plain")}
    ours, theirs = students.values()
    our_original = copy.deepcopy(original)
    for network in (ours, our_original):  # as purify does
        network.to(memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(0)
    batch = bench.images[:size]
    pixels = batch.to(device).float() / 255
    views = tuple(random_views(pixels, settings.views, generator=generator) for _ in range(3))
    anchor, positive, third = views

    def our_views() -> None:
        raw = batch.to(device).float() / 255
        for _ in range(3):
            random_views(raw, settings.views, generator=generator)

    def plain_views() -> None:
        next(plain.batches_of_views(batch, settings, PLAIN, device=device))

    bench.compare(
        "views",
        f"{arch}: views",
        {"ours": bench.clocked(our_views), "plain: PIL, one process": bench.clocked(plain_views)},
        items=3 * size,
        unit="views/s",
    )

    searched = cbd.network_for_search(
        ours, nn.Identity(), pixels, settings, precision=precision, compiled=False
    )

    def our_search() -> Tensor:
        return cbd.search(searched, anchor, third, settings, generator=generator)

    searches: dict[str, Measure] = {"ours": bench.clocked(our_search)}
    for name, habits in each_habit().items():
        searches[name] = bench.clocked(
            lambda habits=habits: plain.search(theirs, anchor, third, settings, habits)
        )
    operations = search_flops(original, pixels, steps)
    times = bench.compare(
        "search",
        f"{arch}: search",
        searches,
        items=size * steps,
        unit="image steps/s",
        flops_per_image_step=operations / (size * steps),
    )
    title = f"{arch}: search, {precision}"
    report_share(bench, title, operations, times.get("ours"), precision)

    optimizers = {name: torch.optim.SGD(net.parameters(), lr=0) for name, net in students.items()}

    compare = cbd.comparison(settings, original, bench.images)

    def our_training() -> None:
        seen = cbd.Views(pixels, positive, third, found=third)
        networks = (in_precision(network, precision) for network in (ours, our_original))
        terms = cbd.loss_terms(*networks, seen, settings, compare)
        optimizers["ours"].zero_grad()
        cbd.weighted_sum(terms, settings).backward()
        optimizers["ours"].step()

    def plain_training(habits: Habits) -> None:
        plain.train(theirs, original, optimizers["plain"], views, settings, habits)

    bench.compare(
        "training",
        f"{arch}: training step",
        {
            "ours": bench.clocked(our_training),
            "plain": bench.clocked(lambda: plain_training(PLAIN)),
            "careful": bench.clocked(lambda: plain_training(CAREFUL)),
        },
        items=size,
        unit="images/s",
        flops_per_image=training_flops(original, pixels) / size,
    )
    compare_whole(bench, arch, original)


def each_habit() -> dict[str, Habits]:
    """Return the plain loop, the plain loop without each of its habits, and the careful loop.

    Those that matter to a search; views are timed apart.
    """
    names = [field.name for field in fields(Habits) if field.name != "pil_views"]
    without = {f"plain without {name}": replace(PLAIN, **{name: False}) for name in names}
    return {"plain": PLAIN, **without, "careful": CAREFUL}


def compare_whole(bench: Bench, arch: str, original: nn.Module) -> None:
    """Compare one epoch of the whole purification, with as many search steps as the paper's.

    Where ours is compiled, that is done anew in every round, from the compiler's cache.
    """
    settings = replace(bench.settings, epochs=1, search=PAPER.search)

    def ours(variant: Variant) -> Callable[[], Any]:
        return lambda: cbd.purify(original, bench.images, settings, **options(bench, variant))

    def theirs(habits: Habits) -> None:
        network = copy.deepcopy(original).requires_grad_(True)
        plain.purify(network, original, bench.images, settings, habits, workers=bench.workers)

    ways = whole_variants(bench)
    measures = {f"ours, {variant}": bench.clocked(ours(variant)) for variant in ways}
    bench.compare(
        "whole",
        f"{arch}: whole purify, one epoch of {len(bench.images)} images",
        {
            **measures,
            "plain": bench.clocked(lambda: theirs(PLAIN)),
            "plain without pil_views": bench.clocked(
                lambda: theirs(replace(PLAIN, pil_views=False))
            ),
            "careful": bench.clocked(lambda: theirs(CAREFUL)),
        },
        items=len(bench.images),
        unit="images/s",
    )


def variants(bench: Bench) -> list[Variant]:
    """Return the ways to run ours that this device is for; plain float32 comes first."""
    if bench.device.type != "cuda":
        return [Variant("fp32", torch.channels_last)]
    layouts = (torch.contiguous_format, torch.channels_last)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    return [Variant(precision, layout) for precision in precisions for layout in layouts]


def whole_variants(bench: Bench) -> list[Variant]:
    """Return the ways to run the whole purify, which lays weights out itself; the last compiled."""
    plain = [variant for variant in variants(bench) if variant.layout == torch.channels_last]
    return [*plain, plain[-1]._replace(compiled=True)]


def options(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Return how ``purify`` is told of a way."""
    how = {"precision": variant.precision, "compiled": variant.compiled}
    return {"device": bench.device, **how}


def searching_variants(bench: Bench) -> list[Variant]:
    """Return the ways to run our search: those of everything, and folded and compiled ones."""
    plain = variants(bench)
    last = [variant for variant in plain if variant.layout == torch.channels_last]
    if bench.device.type != "cuda":
        plain = [Variant("fp32", torch.contiguous_format), *plain]
    twins: list[dict[str, bool]] = [{"folded": True}, {"compiled": True}]
    twins.append({"folded": True, "compiled": True})  # what purify --compile does
    return [*plain, *(variant._replace(**twin) for variant in last for twin in twins)]


def searched_by(
    bench: Bench, title: str, network: nn.Module, pixels: Tensor, variant: Variant
) -> nn.Module:
    """Return a twin as a variant has it, and say how long it took to compile it."""
    network = frozen_twin(network)
    if variant.folded and not fold(network, pixels[: cbd.FOLDED_ON]):
        print(f"  {title}: NOT FOLDED")
    embed = in_precision(network, variant.precision)
    if variant.compiled:
        started = time.perf_counter()
        compile_for_search(embed, pixels)
        seconds = time.perf_counter() - started
        print(f"  {title}: compiled in {seconds:.1f} s")
        bench.record.setdefault("compiled in", {})[title] = seconds
    return embed


def compare_variants(bench: Bench, arch: str, backbone: Backbone) -> None:
    """Compare the ways to run our search, and say how near they come to the limit."""
    settings, device = bench.settings, bench.device
    pixels = bench.images[: settings.batch_size].to(device).float() / 255
    searches, operations = {}, 0.0
    for variant in searching_variants(bench):
        network = copy.deepcopy(backbone).to(device, memory_format=variant.layout).eval()
        embed = searched_by(bench, f"{arch}, {variant}", network, pixels, variant)
        generator = torch.Generator(device).manual_seed(0)

        def search(embed: nn.Module = embed, generator: torch.Generator = generator) -> Tensor:
            return cbd.search(embed, pixels, pixels, settings, generator=generator)

        operations = search_flops(network, pixels, settings.search.steps)
        searches[str(variant)] = bench.clocked(search)
    times = bench.compare(
        "variants",
        f"{arch}: our search, in each precision and layout, folded and compiled",
        searches,
        items=settings.batch_size * settings.search.steps,
        unit="image steps/s",
    )
    for variant in searching_variants(bench):
        title = f"{arch}: search, {variant}"
        report_share(bench, title, operations, times.get(str(variant)), variant.precision)


def report_share(
    bench: Bench, title: str, operations: float, times: list[float] | None, precision: Precision
) -> None:
    """Print what share of the device's measured limit some work has reached."""
    if not times:
        return
    limits = bench.record.setdefault("matrix limits", {})
    limits[precision] = max(limits.get(precision, 0.0), matrix_limit(bench.device, precision))
    reached = operations / statistics.median(times)
    share = reached / limits[precision]
    print(f"  {title}: {reached / 1e9:.1f} GFLOP/s, {share:.0%} of the measured limit")
    bench.record["shares"].append({"title": title, "flops/s": reached, "share": share})


def compare_rivals(bench: Bench, arch: str, checkpoint: Path, folder: Path) -> None:
    """Compare ours with the PGD of other libraries: same model, images, steps, cross-entropy."""
    device, options = bench.device, bench.settings.search
    pixels = bench.images[: bench.settings.batch_size].to(device).float() / 255
    save_file({"images": pixels.cpu()}, folder / "images.safetensors")
    network = Classifier(load_backbone(checkpoint, arch)).to(device).eval()
    network.requires_grad_(False)
    with torch.no_grad():
        logits = network(pixels)
    labels = logits.argmax(1)
    generator = torch.Generator(device).manual_seed(0)
    job = {
        "checkpoint": str(checkpoint),
        "arch": arch,
        "images": str(folder / "images.safetensors"),
        "classes": logits.shape[1],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "epsilon": options.epsilon,
        "step": cbd.step_length(options),
        "steps": options.steps,
    }
    losses: dict[str, float] = {}

    def ours(network: nn.Module) -> Tensor:
        return linf_pgd(
            lambda images: F.cross_entropy(network(images), labels),
            pixels,
            epsilon=job["epsilon"],
            step_size=job["step"],
            steps=job["steps"],
            generator=generator,
        )

    with torch.no_grad():
        losses["before"] = F.cross_entropy(logits, labels).item()
    laid_out = copy.deepcopy(network).to(memory_format=torch.channels_last)  # as purify does
    title, eager = f"{arch}, with its head", Variant("fp32", torch.channels_last, folded=True)
    compiled = eager._replace(compiled=True)
    if device.type != "cpu":  # as purify does
        eager = eager._replace(folded=False)
    networks = {
        "ours": searched_by(bench, title, laid_out, pixels, eager),
        "ours, compiled": searched_by(bench, title, laid_out, pixels, compiled),
    }
    for name, how in networks.items():
        losses[name] = F.cross_entropy(network(ours(how)), labels).item()
    measures = {name: bench.clocked(lambda how=how: ours(how)) for name, how in networks.items()}
    with running_rivals(job, losses) as rivals:
        if rivals:
            bench.compare(
                "rivals",
                f"{arch}: search by cross-entropy, against other libraries",
                {**measures, **rivals},
                items=len(pixels) * options.steps,
                unit="image steps/s",
                losses=losses,
            )
    reached = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    print(f"  {arch}: mean cross-entropy: {reached}")


def compare_victims(bench: Bench, arch: str) -> None:
    """Compare the ways to train a victim with labels, the images being on the device."""
    batches = 100 if bench.device.type == "cuda" else 2
    count = batches * bench.settings.batch_size
    images = bench.images.repeat(-(-count // len(bench.images)), 1, 1, 1)[:count].to(bench.device)
    labels = torch.arange(count, device=bench.device) % 10
    measures = {}
    for variant in variants(bench):
        last = variant.layout == torch.channels_last
        settings = VictimSettings(
            epochs=1, batch_size=bench.settings.batch_size, channels_last=last
        )
        network, _, mean, std, _ = build(arch, classes=10)
        victim = Backbone(network, mean=mean, std=std).to(bench.device)
        measures[str(variant)] = bench.clocked(
            lambda v=victim, s=settings, p=variant.precision: train_supervised(
                v, images, labels, s, precision=p
            )
        )
    bench.compare(
        "victims",
        f"{arch}: training a victim with labels, {count} images",
        measures,
        items=count,
        unit="images/s",
    )


@contextmanager
def running_rivals(job: dict[str, Any], losses: dict[str, float]) -> Iterator[dict[str, Measure]]:
    """Start the rivals that can be had, each waiting in its own environment; end them after."""
    measures: dict[str, Measure] = {}
    processes = []
    for name in RIVALS:
        python = make_environment(name)
        if python is None:
            continue
        process = subprocess.Popen(
            [python, str(HERE / "rival.py"), json.dumps({**job, "rival": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        processes.append(process)

        def measure(name: str = name, process: subprocess.Popen[str] = process) -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("{"):  # libraries print other things
                    answer = json.loads(line)
                    losses[name] = answer["loss"]
                    return float(answer["seconds"])
            raise RuntimeError(f"{name} ended; its message is above")

        measures[name] = measure
    try:
        yield measures
    finally:
        for process in processes:
            process.communicate()  # the end of its input ends it


def make_environment(name: str) -> str | None:
    """Return the interpreter of a rival's own environment, which is made where it is missing.

    torchattacks asks for old versions of what others use, so each has an environment. What it does
    not bring is found in ours: all run on the same PyTorch.
    """
    folder = HERE / ".cache" / name
    python = str(folder / "bin/python")
    if (folder / "made").exists():
        return python
    print(f"making an environment for {name}", flush=True)
    uv = [sys.executable, "-m", "uv", "--quiet"]
    try:
        subprocess.run(
            [*uv, "venv", "--clear", "--python", sys.executable, str(folder)], check=True
        )
        ours = sysconfig.get_path("purelib")
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (site / "ours.pth").write_text(f"{ours}\n")
        install = ["pip", "install", "--python", python, "--no-deps", *RIVALS[name]]
        subprocess.run([*uv, *install], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{name}: left out, because its environment could not be made ({error})")
        return None
    (folder / "made").touch()
    return python


def time_paper(bench: Bench) -> None:
    """Time the paper's whole run on a GPU: ResNet-18, 2,500 images, 15 epochs, 20 steps."""
    images = bench.images.repeat(-(-PAPERS_IMAGES // len(bench.images)), 1, 1, 1)[:PAPERS_IMAGES]
    original = new_backbone("cifar/resnet18", bench.folder)
    operations = flops(original, images[:1].float() / 255)
    for variant in reversed(whole_variants(bench)):
        if time.monotonic() > bench.ends:
            print(f"whole run, {variant}: left out, the budget is spent; raise --budget")
            continue
        torch.cuda.reset_peak_memory_stats(bench.device)
        how = options(bench, variant)
        cbd.purify(original, images, replace(PAPER, epochs=1), **how)  # warm-up
        seconds = bench.clocked(lambda h=how: cbd.purify(original, images, PAPER, **h))()
        memory = peak_memory(bench.device)
        print(f"whole run of the paper, {variant}: {seconds:.1f} s, {memory / 2**20:.0f} MiB")
        bench.record["whole runs"].append(
            {
                "variant": str(variant),
                "seconds": seconds,
                "memory": memory,
                "forward flops": operations,
            }
        )
        bench.write()


def new_backbone(arch: str, folder: Path) -> Backbone:
    """Return the shipped victim of an architecture, or one with random weights of seed 0."""
    return load_backbone(checkpoint_of(arch, folder), arch)


def checkpoint_of(arch: str, folder: Path) -> Path:
    """Return the shipped victim's file, or write one with random weights of seed 0."""
    if arch in VICTIMS:
        return VICTIMS[arch]
    path = folder / f"{arch.rpartition('/')[2]}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(build(arch, classes=10).network.state_dict(), path)
    return path


def read_images(data: str | None, count: int) -> Tensor:
    """Return ``count`` images of 32 pixels: real ones, or random ones, which is said aloud."""
    if data is None:
        print("RANDOM IMAGES: no --data was given. Times are as with real images, losses are not.")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    source = load_images(data, size=32, limit=count)
    return source.read(range(count))


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    cuda = device.type == "cuda"
    commit = None
    if git := shutil.which("git"):
        asked = [git, "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU",
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "commit": commit,
        "load before": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
        "tf32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
    }


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="does it run; numbers mean nothing")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--data", help="images, as `unbackdoor purify --images` takes them")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--networks", nargs="+", help="architectures; by default WRN and ResNet")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to compare")
    parser.add_argument(
        "--images", type=int, help="of the whole purify; by default 19 batches on CUDA, 2 elsewhere"
    )
    parser.add_argument(
        "--budget", type=float, default=420, help="seconds; what no longer fits is left out"
    )
    parser.add_argument("--batch-size", type=int, help="by default 128 on CUDA and 32 elsewhere")
    parser.add_argument("--steps", type=int, help="of a search; 20 on CUDA and 4 elsewhere")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--workers", type=int, help="of the plain loop's data loader")
    return parser.parse_args()


def main() -> None:
    """Measure everything that the budget allows, print it, write it."""
    started = time.monotonic()
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = pick_device(given.device)
    cuda = device.type == "cuda"
    size, steps = (16, 2) if given.quick else (128, 20) if cuda else (32, 4)
    settings = replace(
        PAPER,
        batch_size=given.batch_size or size,
        search=SearchSettings(kind="image", steps=given.steps or steps),
    )
    batches = 1 if given.quick else 19 if cuda else 2
    networks = ["cifar/wrn16_1"] if given.quick else ["cifar/wrn16_1", "cifar/resnet18"]
    networks = given.networks or networks
    count = given.images or batches * settings.batch_size
    if count % settings.batch_size:
        raise SystemExit(f"--images {count} are no whole batches of {settings.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "on": describe(device),
            "quick": given.quick,
            "data": Path(given.data).name if given.data else "random",
            "batch": settings.batch_size,
            "steps": settings.search.steps,
            **{name: [] for name in ("parts", "shares", "whole runs")},
        }
        bench = Bench(
            device=device,
            settings=settings,
            images=read_images(given.data, count),
            repeats=2 if given.quick else given.repeats,
            workers=given.workers if given.workers is not None else 8 if cuda else 0,
            ends=started + given.budget,
            only=tuple(given.only),
            parts=len(given.only) * len(networks),
            record=record,
            folder=Path(folder),
            out=given.out,
        )
        print(*(f"{name}: {value}" for name, value in record["on"].items()), sep="\n")
        if cuda and "whole" in given.only and not given.quick:
            time_paper(bench)
        for arch in networks:
            backbone = new_backbone(arch, bench.folder)
            compare_network(bench, arch, backbone)
            if "variants" in given.only:
                compare_variants(bench, arch, backbone)
            if "victims" in given.only:
                compare_victims(bench, arch)
            if "rivals" in given.only:
                compare_rivals(bench, arch, checkpoint_of(arch, bench.folder), bench.folder)
    record["memory"] = peak_memory(device)
    record["seconds"] = time.monotonic() - started
    print(f"\npeak memory: {record['memory'] / 2**20:.0f} MiB; all took {record['seconds']:.0f} s")
    bench.write()


if __name__ == "__main__":
    main()
