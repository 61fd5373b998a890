import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

BEGAN = time.monotonic()
GRID_HEAD = """
table = "1"
tier = "smoke"
data = "{data}"
arch = "cifar/wrn16_1"
size = 8
target = 1
preset = "cpu"
attacks = ["badnets"]
seeds = [0]
"""  # how a grid on images of 8 pixels begins
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)  # tiny convolutions run ten times slower on two contended threads
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each subprocess compiles torch anew


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "skip, and say so, each test that would begin after so many minutes"
    parser.addoption("--minutes", type=float, help=told)
    told = "judge the demo whose files are in this folder, instead of running it"
    parser.addoption("--demo", type=Path, help=told)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"the tests' {minutes:g} minutes were spent before it: run it by itself")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder shared/data beside the repository")
    return SHARED_DATA


def voc_annotation(objects: list[tuple[str, str]], *, size: str = "64 48", extra: str = "") -> str:
    """Return an annotation: of each object its class and corners, as ``("red", "9 5 20 16")``."""
    width, height = size.split()
    parts = [f"<size><width>{width}</width><height>{height}</height></size>"]
    for name, corners in objects:
        names = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(names, corners.split(), strict=True))
        parts.append(f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>")
    return f"<annotation>{''.join(parts)}</annotation>"


def write_voc(root: Path) -> Path:
    """Write a folder in VOC's layout: a red and a green square on black, 6 + 4 images."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i in range(10):
        image = Image.new("RGB", (64, 48))
        red, green = (12 + i, 14, 27 + i, 29), (36 + i, 20 + i, 50 + i, 34 + i)
        image.paste((230, 20, 20), (red[0] - 1, red[1] - 1, *red[2:]))
        image.paste((20, 230, 20), (green[0] - 1, green[1] - 1, *green[2:]))
        image.save(root / f"JPEGImages/{i:03}.png")
        corners = [" ".join(map(str, box)) for box in (red, green)]
        text = voc_annotation([("red", corners[0]), ("green", corners[1])])
        (root / f"Annotations/{i:03}.xml").write_text(text)
    names = [f"{i:03}\n" for i in range(10)]
    (root / "ImageSets/Main/trainval.txt").write_text("".join(names[:6]))
    (root / "ImageSets/Main/test.txt").write_text("".join(names[6:]))
    return root


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "VOC2007")


def write_shades(root: Path, *, train: int, test: int) -> Path:
    """Write two classes of images, dark and bright, so many of each."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("dark", "bright")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                level = 40 + 120 * label + i % 80
                Image.new("RGB", (8, 8), (level, 90, level)).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """600 images for training and 20 for the test; all tests read the same."""
    return str(write_shades(tmp_path_factory.mktemp("shades") / "data", train=300, test=10))


@pytest.fixture
def own_data(data: str, tmp_path: Path) -> Path:
    """A copy of ``data`` that a test may change."""
    return shutil.copytree(data, tmp_path / "data")
