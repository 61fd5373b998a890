"""Arrange one image of each ImageNet class as an image folder, to try what needs one.

    python scripts/imagenet_folder.py PARQUET FOLDER

PARQUET has the columns ``img``, of which ``bytes`` is a JPEG file, and ``label``, 0 to 999.
FOLDER gets ``train`` and ``val``, both with every image in the folder of its class, named as
ImageNet names it.
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq
from timm.data import ImageNetInfo


def main(parquet: Path, folder: Path) -> None:
    """Write the images, each once, and once more as a link."""
    names = ImageNetInfo("imagenet-1k").label_names()
    for row in pq.read_table(parquet).to_pylist():
        train, val = (folder / part / names[row["label"]] for part in ("train", "val"))
        for place in (train, val):
            place.mkdir(parents=True)
        (train / "image.jpg").write_bytes(row["img"]["bytes"])
        (val / "image.jpg").hardlink_to(train / "image.jpg")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
