"""Compare searches: how close does what each one finds come to the triggered features?

    python scripts/compare_searches.py --data cifar10:DIR

No network is tuned and no setting chosen. For every victim, each search perturbs the same unlabeled
images; what it found is then held against the triggered images that it never saw:

- target: share of the found images that the victim's own head takes for the attacker's class;
- cosine: of the mean shift of the found images' features to that of the triggered ones;
- neighbours: mean share, among the 10 nearest of a triggered image's features, of found images
  (the others are clean);
- concentration: squared length of the mean centred unit feature of the found images, all that
  somebody without labels can see.

Searches for one change of all images start at several random places; the mean over the starts is
given, and the start with the highest concentration.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.attacks.named import named_attack
from unbackdoor.attacks.poisoning import Attack
from unbackdoor.backbones import Backbone
from unbackdoor.bench.obtain import open_victim
from unbackdoor.cbd import search
from unbackdoor.changes import concentration
from unbackdoor.data import LabeledImages, load_labeled
from unbackdoor.evaluation import divide, find_attack, own_head
from unbackdoor.outputs import name_trained
from unbackdoor.settings import PurifySettings, SearchSettings, ViewSettings, purify_preset
from unbackdoor.views import random_views

IMAGES, BATCH, STEPS, STARTS, NEIGHBOURS = 256, 64, 40, 3, 10
MILD = ViewSettings(min_area=0.9, jitter=0.0, grey=0.0)
PACKAGED = {  # what the package has; each batch of 128 anew
    "each image alone, Linf 8/255, 20 steps (the paper's)": replace(
        purify_preset("cifar10"), views=MILD
    ),
    "shared, L2 1024/255, 8 steps, temperature .1 (the demo's)": PurifySettings(
        temperature=0.1,
        search=SearchSettings("batch", "l2", epsilon=1024 / 255, steps=8, step_size=0.25),
    ),
    "fourteen changes, one an image (the default of purify)": PurifySettings(views=MILD),
}
Change = Callable[[Tensor], Tensor]


class Family(NamedTuple):
    """One change of all images, with numbers to learn."""

    learned: list[Tensor]
    apply: Change
    penalty: Callable[[], Tensor]


def additive(side: int, radius: float, generator: torch.Generator, *, coarse: int = 0) -> Family:
    """Add one image of L2 length at most ``radius``; ``coarse`` pixels a side, scaled up."""
    shape = (1, 3, coarse or side, coarse or side)
    start = torch.randn(shape, generator=generator)
    delta = (0.5 * radius * start / start.norm()).requires_grad_()

    def apply(images: Tensor) -> Tensor:
        shift = delta
        if coarse:
            shift = F.interpolate(delta, size=side, mode="bicubic", align_corners=False)
        shift = shift * (radius / shift.norm()).clamp(max=1)
        return (images + shift).clamp(0, 1)

    return Family([delta], apply, lambda: torch.zeros(()))


def patch(side: int, generator: torch.Generator, *, price: float = 0.002) -> Family:
    """Replace pixels by those of one image, through a soft mask that costs ``price`` a pixel."""
    mask = torch.randn(1, 1, side, side, generator=generator).sub(1).requires_grad_()
    paint = torch.randn(1, 3, side, side, generator=generator).requires_grad_()

    def apply(images: Tensor) -> Tensor:
        return torch.lerp(images, paint.sigmoid(), mask.sigmoid())

    return Family([mask, paint], apply, lambda: price * mask.sigmoid().sum())


def warp(side: int, generator: torch.Generator, *, pixels: float = 1.0) -> Family:
    """Move every pixel along one smooth field by at most ``pixels``."""
    field = torch.rand(1, 2, 4, 4, generator=generator).mul(2).sub(1).requires_grad_()
    base = F.affine_grid(torch.eye(2, 3)[None], [1, 3, side, side], align_corners=True)

    def apply(images: Tensor) -> Tensor:
        smooth = F.interpolate(field.tanh(), size=side, mode="bicubic", align_corners=True)
        grid = base + 2 * pixels / side * smooth.permute(0, 2, 3, 1)
        grid = grid.clamp(-1, 1).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, align_corners=True)

    return Family([field], apply, lambda: torch.zeros(()))


FAMILIES: dict[str, Callable[[int, torch.Generator], Family]] = {
    "one image added, L2 1": lambda side, draws: additive(side, 1.0, draws),
    "one image added, L2 2": lambda side, draws: additive(side, 2.0, draws),
    "one image added, L2 4": lambda side, draws: additive(side, 4.0, draws),
    "one coarse image added (8x8), L2 4": lambda side, draws: additive(side, 4.0, draws, coarse=8),
    "one patch behind a learned mask": patch,
    "one smooth warp, 1 pixel": warp,
}


def concentrate(
    backbone: Backbone, images: Tensor, family: Family, generator: torch.Generator
) -> None:
    """Learn the change that moves the features of all ``images`` to one place.

    Raises the squared length of the mean unit feature, after the clean mean has been taken away.
    """
    with torch.no_grad():
        centre = backbone(images).mean(0)
    optimizer = torch.optim.Adam(family.learned, lr=0.1)
    for _ in range(STEPS):
        batch = images[torch.randperm(len(images), generator=generator)[:BATCH]]
        loss = family.penalty() - concentration(backbone(family.apply(batch)), centre)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(
    backbone: Backbone, images: Tensor, found: Tensor, triggered: Tensor, *, target: int
) -> dict[str, float]:
    """Return how close the features of ``found`` come to those of ``triggered``."""
    clean = backbone(images)
    unit, at, away = (
        F.normalize(features - clean.mean(0), dim=1)
        for features in (clean, backbone(found), backbone(triggered))
    )
    nearest = (away @ torch.cat([unit, at]).T).topk(NEIGHBOURS, dim=1).indices
    taken_for = own_head(backbone, classes=10)(backbone(found)).argmax(1)
    return {
        "target": (taken_for == target).float().mean().item(),
        "cosine": F.cosine_similarity(at.mean(0), away.mean(0), dim=0).item(),
        "neighbours": (nearest >= len(clean)).float().mean().item(),
        "concentration": at.mean(0).square().sum().item(),
    }


def compare(
    backbone: Backbone, attack: Attack, images: Tensor, others: LabeledImages
) -> dict[str, Any]:
    """Run every search on one victim."""
    triggered = attack.trigger(others.images[others.labels != attack.target]).float() / 255
    rows: dict[str, Any] = {}
    for name, settings in PACKAGED.items():
        generator, started, found = torch.Generator().manual_seed(0), time.monotonic(), []
        for batch in images.split(128):
            anchor = random_views(batch, settings.views, generator=generator)
            found.append(search(backbone, anchor, batch, settings, generator=generator))
        seconds = time.monotonic() - started
        judged = judge(backbone, images, torch.cat(found), triggered, target=attack.target)
        rows[name] = {"starts": [judged], "seconds": seconds}
    for name, make in FAMILIES.items():
        judged_starts, started = [], time.monotonic()
        for seed in range(STARTS):
            generator = torch.Generator().manual_seed(seed)
            family = make(images.shape[-1], generator)
            concentrate(backbone, images, family, generator)
            with torch.no_grad():
                found_images = family.apply(images)
            judged_starts.append(
                judge(backbone, images, found_images, triggered, target=attack.target)
            )
        seconds = (time.monotonic() - started) / STARTS
        rows[name] = {"starts": judged_starts, "seconds": seconds}
    for row in rows.values():
        row["mean"] = {
            key: statistics.fmean(start[key] for start in row["starts"]) for key in row["starts"][0]
        }
        row["strongest"] = max(row["starts"], key=lambda start: start["concentration"])
    return rows


def main() -> None:
    """Compare on every victim with a record, and on the clean one under BadNets' trigger."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--victims", type=Path, default=Path("results/victims"))
    parser.add_argument("--out", type=Path, default=Path("results/searches.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for path in sorted(arguments.victims.glob("*-supervised-*.json")):
        made = json.loads(path.read_text())
        size = made["size"]
        found = name_trained(path.with_suffix(".safetensors"))
        backbone = open_victim(found, made).backbone.requires_grad_(False)
        parts = [load_labeled(arguments.data, split=s, size=size) for s in ("train", "test")]
        split = divide(*parts, seed=0)
        if made["attack"] is None:
            attack = named_attack("badnets", size=size, training="supervised")
        else:
            attack = find_attack(str(path), size=size).attack
        images = split.unlabeled[:IMAGES].float() / 255
        assert split.validation is not None  # noqa: S101 - divide gives one
        others = LabeledImages(
            split.validation.images[:IMAGES], split.validation.labels[:IMAGES], parts[0].classes
        )
        results[path.stem] = compare(backbone, attack, images, others)
        for name, row in results[path.stem].items():
            numbers = "  ".join(f"{key} {value:.2f}" for key, value in row["mean"].items())
            print(f"{path.stem}: {name}: {numbers}  {row['seconds']:.0f} s", flush=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
