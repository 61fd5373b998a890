"""Is a device right, and what is fast on it? To run first on a machine that is new.

    python benchmarks/check_device.py cuda

What it computes is held against the CPU: triggers, features, gradients of both presets' losses, a
training that is resumed. Then come times, in milliseconds, with two ways to be faster that are not
in the package (cuDNN's choice by measuring, CUDA graphs), so that one can decide on them. A line a
finding; ``wrong`` where it is beyond its limit, and the exit status tells. A part that fails does
not stop the rest.
"""

import copy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from unbackdoor import cbd
from unbackdoor.attack_jobs import attacks_of_clean
from unbackdoor.backbones import Backbone, build, load_backbone
from unbackdoor.changes import Pool, Whitening, draw_changes
from unbackdoor.devices import (
    deterministic,
    frozen_twin,
    in_precision,
    laid_out,
    pick_precision,
    wait_for,
)
from unbackdoor.probe import extract
from unbackdoor.resume import read_state, write_state
from unbackdoor.settings import VictimSettings, purify_preset
from unbackdoor.victims import Epoch, TrainingState, train_supervised
from unbackdoor.views import random_views

CPU = torch.device("cpu")
DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
ARCH = sys.argv[2] if len(sys.argv) > 2 else "cifar/resnet18"
TIMES = 50 if DEVICE.type == "cuda" else 2
VICTIM = Path(__file__).parents[1] / "results/victims/badnets-supervised-seed0.safetensors"
GROUPS = ("network", "momentum", "generator")
BATCH = 128


def smooth_images() -> Tensor:
    """Return random images that vary as slowly as photographs do."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8, generator=draws)
    return F.avg_pool2d(noise.float(), 3, 1, 1).to(torch.uint8)


RAW = smooth_images()
BEYOND: list[str] = []  # what is wrong


def tell(what: str, found: float, *, limit: float) -> None:
    """Print a finding, and whether it is within its limit."""
    wrong = not found <= limit
    if wrong:
        BEYOND.append(what)
    print(f"{what}: {found:.1e}{f', wrong: more than {limit:.0e}' if wrong else ''}")


def gap(found: Tensor, wanted: Tensor) -> float:
    """Return how far tensors are apart, as a share of the second's norm."""
    found, wanted = (each.detach().double().cpu() for each in (found, wanted))
    return ((found - wanted).norm() / wanted.norm()).item()


def triggers() -> None:
    """Hold triggered images against those of the CPU, in grey levels."""
    for name, attack in attacks_of_clean(32, "supervised").items():
        off = attack.trigger(RAW).int() - attack.trigger(RAW.to(DEVICE)).cpu().int()
        tell(f"trigger {name}, grey levels apart at most", float(off.abs().max()), limit=1)


def features() -> None:
    """Hold a victim's features against those of the CPU."""
    network = load_backbone(VICTIM, "cifar/wrn16_1")
    wanted = extract(network, RAW[:BATCH])
    there = laid_out(copy.deepcopy(network).to(DEVICE))
    for precision, limit in (("fp32", 1e-2), ("bf16", 5e-2)):
        found = extract(in_precision(there, precision), RAW[:BATCH])
        tell(f"features, {precision}", gap(found, wanted), limit=limit)


def gradients() -> None:
    """Hold the gradients of the method's losses against those of the CPU."""
    for preset in ("default", "cifar10"):
        settings = purify_preset(preset)

        def gradient(device: torch.device, precision: str, settings=settings) -> Tensor:
            student = load_backbone(VICTIM, "cifar/wrn16_1").to(device)
            student = laid_out(student).requires_grad_(True)
            before = copy.deepcopy(student).requires_grad_(False)
            plain = RAW[:64].to(device).float() / 255
            views = cbd.Views(plain, plain.flip(3), plain, (plain + 0.02).clamp(0, 1))
            run, old = in_precision(student, precision), in_precision(before, precision)
            with deterministic():
                compare = cbd.comparison(settings, old, RAW)
                terms = cbd.loss_terms(run, old, views, settings, compare)
                cbd.weighted_sum(terms, settings).backward()
            grads = [weight.grad for weight in student.parameters() if weight.grad is not None]
            return torch.cat([grad.flatten().cpu() for grad in grads])

        wanted = gradient(CPU, "fp32")
        for precision, limit in (("fp32", 2e-2), ("bf16", 2e-1)):
            found = gap(gradient(DEVICE, precision), wanted)
            tell(f"gradients, preset {preset}, {precision}", found, limit=limit)


def resuming() -> None:
    """Train twice alike, and once with a file in between."""
    settings = VictimSettings(epochs=4, batch_size=64, learning_rate=0.02)
    images, labels = RAW.to(DEVICE), (torch.arange(len(RAW)) % 10).to(DEVICE)
    precision = pick_precision("auto", DEVICE)
    states: list[TrainingState] = []

    def trained(state: TrainingState | None = None) -> Tensor:
        net = build("cifar/wrn16_1", classes=10)
        network = Backbone(net.network, mean=net.mean, std=net.std)
        train_supervised(
            network,
            images,
            labels,
            settings,
            precision=precision,
            state=state,
            on_epoch=states.append,
        )
        return torch.cat([weight.flatten().cpu() for weight in network.parameters()])

    whole, again = trained(), trained()
    kept = states[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        tensors = (kept.network, kept.momentum, {"state": kept.generator})
        write_state(path, kept.history, dict(zip(GROUPS, tensors, strict=True)), {})
        history, read = read_state(path, {}, groups=GROUPS)
    epochs = tuple(Epoch(*epoch) for epoch in history)
    tensors = (read["network"], read["momentum"], read["generator"]["state"])
    tell("a training, done again", gap(again, whole), limit=0)
    tell("a training, resumed", gap(trained(TrainingState(epochs, *tensors)), whole), limit=0)


def milliseconds(work: Callable[[], object], times: int = TIMES) -> float:
    """Return how long ``work`` takes."""
    for _ in range(min(times, 5)):
        work()
    wait_for(DEVICE)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(DEVICE)
    return 1e3 * (time.perf_counter() - started) / times


def fresh(*, train: bool) -> Backbone:
    """Return a new network on the device, with its head if it is to be trained."""
    net = build(ARCH, classes=10)
    heads = () if train else net.heads
    network = Backbone(net.network, heads, mean=net.mean, std=net.std).to(DEVICE)
    return laid_out(network).train(train)


IMAGES = RAW[:BATCH].to(DEVICE).float().div(255).contiguous(memory_format=torch.channels_last)
LABELS = (torch.arange(BATCH) % 10).to(DEVICE)


def step_of(run: nn.Module, network: nn.Module) -> Callable[[], Tensor]:
    """Return a step of supervised training."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> Tensor:
        loss = F.cross_entropy(run(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def graphed(module: nn.Module, sample: Tensor) -> nn.Module:
    """Return a module as a CUDA graph; its running statistics stay as they are."""
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    module = torch.cuda.make_graphed_callables(module, (sample,))
    module.load_state_dict(kept)
    return module


def training() -> None:
    """Time a step of supervised training."""
    for precision in ("fp32", "bf16"):
        network = fresh(train=True)
        step = step_of(in_precision(network, precision), network)
        with deterministic():
            print(f"training step, {precision}: {milliseconds(step):.2f} ms")
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, True
        print(f"training step, {precision}, cuDNN measures: {milliseconds(step):.2f} ms")
        cudnn.benchmark = before
    if DEVICE.type != "cuda":
        return
    network = fresh(train=True)
    twin = copy.deepcopy(network)
    with deterministic():
        ours = step_of(in_precision(network, "bf16"), network)
        theirs = step_of(graphed(in_precision(twin, "bf16"), IMAGES.clone()), twin)
        losses = [(ours().item(), theirs().item()) for _ in range(10)]
        print(f"training step, bf16, as a graph: {milliseconds(theirs):.2f} ms")
    tell("its tenth loss apart", abs(losses[-1][0] - losses[-1][1]), limit=1e-2)


class Copied(nn.Module):
    """Hands on copies: what a graph returns is overwritten by its next run."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        """Return the graph's output."""
        return self.graph(images).clone()


def searching() -> None:
    """Time the paper's search of 20 steps."""
    settings = purify_preset("cifar10")
    network = fresh(train=False).requires_grad_(True)
    ways: dict[str, nn.Module] = {"as it is": in_precision(network, "bf16")}
    if DEVICE.type == "cuda":
        with deterministic():
            twin = in_precision(frozen_twin(network), "bf16").eval()
            ways["as a graph"] = Copied(graphed(twin, IMAGES.clone().requires_grad_(True))).eval()
    found = {}
    for name, embed in ways.items():
        draws = torch.Generator(DEVICE)

        def search(embed: nn.Module = embed, draws: torch.Generator = draws) -> Tensor:
            draws.manual_seed(0)
            return cbd.search(embed, IMAGES, IMAGES, settings, generator=draws)

        with deterministic():
            spent = milliseconds(search, max(2, TIMES // 10))
            print(f"search of 20 steps, bf16, {name}: {spent:.1f} ms")
            found[name] = search() - IMAGES
    for name, moved in found.items():
        tell(f"images found {name}, apart", gap(moved, found["as it is"]), limit=1e-2)


def others() -> None:
    """Time what else the jobs wait for."""
    default, papers = purify_preset("default"), purify_preset("cifar10")
    draws = torch.Generator(DEVICE).manual_seed(0)
    network = fresh(train=False).requires_grad_(False)
    run = in_precision(network, "bf16")
    whiten = Whitening.of(extract(run, RAW).to(DEVICE), shrinkage=0.1)
    drawn = draw_changes(default.changes, (3, 32, 32), generator=draws)
    pool = Pool(drawn, whiten=whiten, rate=0.1)
    spent = milliseconds(lambda: pool.advance(run, IMAGES), max(2, TIMES // 5))
    print(f"a step of learning changes, bf16: {spent:.1f} ms")
    many = RAW.repeat(20 if DEVICE.type == "cuda" else 1, 1, 1, 1)
    print(
        f"features of {len(many)} images: {milliseconds(lambda: extract(network, many), 2):.0f} ms"
    )
    views = milliseconds(lambda: random_views(IMAGES, papers.views, generator=draws))
    print(f"the paper's views of {BATCH} images: {views:.2f} ms")


if __name__ == "__main__":
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else str(DEVICE)
    print(f"{name}, PyTorch {torch.__version__}, {ARCH}, batches of {BATCH}")
    for part in (triggers, features, gradients, resuming, training, searching, others):
        try:
            part()
        except Exception:
            BEYOND.append(part.__name__)
            traceback.print_exc(limit=-4, file=sys.stdout)
        sys.stdout.flush()
    sys.exit(1 if BEYOND else 0)
