"""Learn a patch in every window of an image in turn: does a network give its backdoor away?

    python scripts/scan_windows.py --data cifar10:DIR

In each of 7 x 7 windows of 5 pixels, one patch is learned so that it gathers the features of all
images (see `unbackdoor.changes`), on a backdoored development victim and on a clean network. Writes
`results/windows.json`: the concentration that is reached, and the cosine between the mean shift of
the patched images' features and that of triggered ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.bench.obtain import open_victim
from unbackdoor.changes import Patch, Pool, Whitening, concentration
from unbackdoor.data import load_images
from unbackdoor.evaluation import find_attack
from unbackdoor.outputs import name_trained
from unbackdoor.settings import ChangeSettings

ATTACKED = Path("results/development/badnets-supervised-seed100.json")
CLEAN = Path("results/victims/clean-supervised-seed0.json")
SIDE, STEPS, IMAGES, BATCH = 5, 20, 256, 64


def scan(record: Path, data: str) -> dict[str, Any]:
    """Return a row of windows for every height: concentration and cosine."""
    made = json.loads(record.read_text())
    size = made["size"]
    network = open_victim(name_trained(record.with_suffix(".safetensors")), made).backbone
    network = network.requires_grad_(False).to(memory_format=torch.channels_last)
    raw = load_images(data, size=size, limit=IMAGES, seed=100).read(range(IMAGES))
    images, triggered = (
        (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
        for pixels in (raw, find_attack(str(ATTACKED), size=size).attack.trigger(raw))
    )
    plain = network(images)
    centre, whiten = plain.mean(0), Whitening.of(plain, shrinkage=ChangeSettings().shrinkage)
    away = F.normalize(network(triggered) - centre, dim=1).mean(0)
    generator = torch.Generator().manual_seed(0)
    places = sorted({min(place, size - SIDE) for place in range(0, size, SIDE)})
    rows = []
    for top in places:
        row = []
        for left in places:
            picture = torch.rand(1, 3, SIDE, SIDE, generator=generator)
            patch = Patch(picture, top=top, left=left)
            pool = Pool([patch], whiten=whiten, rate=0.1)
            for _ in range(STEPS):
                pool.advance(network, images[torch.randperm(IMAGES, generator=generator)[:BATCH]])
            with torch.no_grad():
                features = network(patch(images))
            shift = F.normalize(features - centre, dim=1).mean(0)
            cosine = F.cosine_similarity(shift, away, dim=0).item()
            reached = concentration(whiten(features), 0.0).item()
            row.append([round(reached, 3), round(cosine, 3)])
        print(record.stem, top, " ".join(f"{c:.2f}/{a:+.2f}" for c, a in row), flush=True)
        rows.append(row)
    return {"places": places, "rows": rows}


def main() -> None:
    """Scan both networks and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("results/windows.json"))
    given = parser.parse_args()
    found = {record.stem: scan(record, given.data) for record in (ATTACKED, CLEAN)}
    given.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
