"""Arrange one image of each ImageNet class as an image folder, to try what needs one.

    python scripts/imagenet_folder.py PARQUET FOLDER [--group N]

PARQUET has the columns ``img``, of which ``bytes`` is a JPEG file, and ``label``, 0 to 999.
FOLDER gets ``train`` and ``val``, both with every image in the folder of its class, named as
ImageNet names it; in ``val`` it is mirrored, as nothing takes the same images for both. With
``--group 10``, ten neighbouring classes are one, named after the first, and ``val`` has one image
of each: 100 classes, as ImageNet-100 has, of which a CPU scores the test images soon. That shows
whether all runs at 224 pixels, and what it costs; scores on such images mean nothing.
"""

import argparse
import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageOps
from timm.data import ImageNetInfo


def main() -> None:
    """Write the images as they are, and those of ``val`` mirrored."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", type=int, default=1, help="classes that become one")
    given = parser.parse_args()
    if given.group < 1:
        parser.error(f"--group is 1 or more, got {given.group}")
    given.folder.mkdir(parents=True)
    names = ImageNetInfo("imagenet-1k").label_names()
    for row in pq.read_table(given.parquet).to_pylist():
        name = names[row["label"] // given.group * given.group]
        train, val = (given.folder / part / name for part in ("train", "val"))
        train.mkdir(parents=True, exist_ok=True)
        (train / f"{row['label']:03}.jpg").write_bytes(row["img"]["bytes"])
        if not val.exists():
            val.mkdir(parents=True)
            with Image.open(io.BytesIO(row["img"]["bytes"])) as image:
                mirrored = ImageOps.mirror(image.convert("RGB"))
            mirrored.save(val / f"{row['label']:03}.jpg", quality=85)


if __name__ == "__main__":
    main()
