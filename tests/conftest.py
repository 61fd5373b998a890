import os
from pathlib import Path

import pytest
import torch
from PIL import Image

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)  # tiny convolutions run ten times slower on two contended threads
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each subprocess compiles torch anew


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder shared/data beside the repository")
    return SHARED_DATA


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two classes of images, dark and bright, 600 for training and 20 for the test."""
    for split, count in (("train", 300), ("test", 10)):
        for label, name in enumerate(("dark", "bright")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                level = 40 + 120 * label + i % 80
                Image.new("RGB", (8, 8), (level, 90, level)).save(folder / f"{i:03}.png")
    return str(tmp_path / "data")
