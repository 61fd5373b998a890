"""Pack the first 5,000 test images of Fashion-MNIST for the package, losslessly.

Run it as ``python scripts/pack_fashion_mnist.py DIR``, DIR with ``t10k-images-idx3-ubyte.gz`` and
``t10k-labels-idx1-ubyte.gz`` (Debian: ``dataset-fashion-mnist``). It writes into
``unbackdoor/assets/``:

- ``fashion_mnist.webp``: the images row by row in one grey picture, 50 in a row;
- ``fashion_mnist.txt``: their labels, one digit each, in the same arrangement.
"""

import sys
from pathlib import Path

from PIL import Image

from unbackdoor.data import read_idx

ASSETS = Path(__file__).parents[1] / "unbackdoor" / "assets"
ROWS, COLUMNS = 100, 50


def main(folder: Path) -> None:
    """Write both files."""
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", item=(28, 28))[: ROWS * COLUMNS]
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", item=())[: ROWS * COLUMNS]
    tiles = images.reshape(ROWS, COLUMNS, 28, 28).transpose(0, 2, 1, 3)
    atlas = Image.fromarray(tiles.reshape(ROWS * 28, COLUMNS * 28)).convert("RGB")
    atlas.save(ASSETS / "fashion_mnist.webp", lossless=True, quality=100, method=6)
    lines = ["".join(map(str, line)) + "\n" for line in labels.reshape(ROWS, COLUMNS)]
    (ASSETS / "fashion_mnist.txt").write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
