"""Arrange one image of each ImageNet class as an image folder, to try what needs one.

    python scripts/imagenet_folder.py PARQUET FOLDER

PARQUET has the columns ``img``, of which ``bytes`` is a JPEG file, and ``label``, 0 to 999.
FOLDER gets ``train`` and ``val``, both with every image in the folder of its class, named as
ImageNet names it; in ``val`` it is mirrored, as nothing takes the same images for both. That shows
whether all runs at 224 pixels, and what it costs; scores on such images mean nothing.
"""

import io
import sys
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageOps
from timm.data import ImageNetInfo


def main(parquet: Path, folder: Path) -> None:
    """Write the images, each once as it is and once mirrored."""
    names = ImageNetInfo("imagenet-1k").label_names()
    for row in pq.read_table(parquet).to_pylist():
        train, val = (folder / part / names[row["label"]] for part in ("train", "val"))
        for place in (train, val):
            place.mkdir(parents=True)
        (train / "image.jpg").write_bytes(row["img"]["bytes"])
        with Image.open(io.BytesIO(row["img"]["bytes"])) as image:
            ImageOps.mirror(image.convert("RGB")).save(val / "image.jpg", quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
