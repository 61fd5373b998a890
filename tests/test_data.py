import ctypes
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from unbackdoor import data
from unbackdoor.data import (
    ImageSource,
    draw_rows,
    even_rows,
    from_tensor,
    load_images,
    load_labeled,
)
from unbackdoor.errors import DataError, UnlabeledError

torch.set_num_threads(1)

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


def noise(n: int, *, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def encode(image: Image.Image | torch.Tensor, kind: str = "png", **options) -> bytes:
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, images: torch.Tensor) -> Path:
    for i, image in enumerate(images):
        path = folder / f"{i % 2}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return folder


def in_folder_order(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images[0::2], images[1::2]])


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shard(path: Path, images: torch.Tensor) -> Path:
    return write_tar(path, {f"{i:06}.png": encode(image) for i, image in enumerate(images)})


def write_parquet(path: Path, images: torch.Tensor, *, labels=None, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    table = {"img": cells} | ({} if labels is None else {"label": labels})
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">{values.ndim + 1}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def write_fashion_mnist(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> str:
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return f"fashion-mnist:{folder}"


def write_cifar10(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1)
    path.write_bytes(records.numpy().tobytes())


def read_all(source: ImageSource) -> torch.Tensor:
    return source.read(range(len(source)))


# Sources.


def test_a_folder_is_read_at_any_depth_in_the_order_of_names(tmp_path):
    images = noise(5)
    source = load_images(write_folder(tmp_path, images))
    assert isinstance(source, ImageSource)
    assert (len(source), source.size, source.broken) == (5, (8, 8), [])
    assert torch.equal(read_all(source), in_folder_order(images))


def test_hidden_files_link_loops_and_other_files_are_ignored(tmp_path):
    write_folder(tmp_path / "set", noise(3))
    for name in (".hidden.png", ".cache/x.png", "notes.txt"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(1)[0]))
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert len(load_images(tmp_path / "set")) == 3
    assert len(load_images(f"{tmp_path}/set/*/*.png")) == 3
    write_folder(tmp_path / ".set", noise(2))
    assert len(load_images(f"{tmp_path}/.set/*/*.png")) == 2  # asked for by its name
    assert len(load_images(f"{tmp_path}/*/.cache/*.png")) == 1
    assert len(load_images(f"{tmp_path}/*/.*.png")) == 1
    assert len(load_images(f"{tmp_path}/s*/../set/0/*.png")) == 2
    with pytest.raises(DataError, match=r"\*\* is an entire part of a path"):
        load_images(f"{tmp_path}/set/**.png")


def test_a_linked_folder_is_followed(tmp_path):
    write_folder(tmp_path / "elsewhere", noise(3))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(load_images(tmp_path / "set")) == 3


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_the_image_column_of_a_parquet_file_is_found_by_its_type(tmp_path, kind):
    images = noise(7)
    cells = [encode(image) for image in images]
    path = tmp_path / "x.parquet"
    if kind == "struct":
        write_parquet(path, images, labels=[0] * 7)
    else:
        table = {"id": list(range(7)), "picture": pa.array(cells, getattr(pa, kind)())}
        pq.write_table(pa.table(table), path)
    assert torch.equal(read_all(load_images(path)), images)


def test_a_folder_of_parquet_files_is_one_set(tmp_path):
    images = noise(10)
    for i, part in enumerate(images.split(4)):
        write_parquet(tmp_path / "data" / f"train-{i:05}-of-00003.parquet", part)
    assert torch.equal(read_all(load_images(tmp_path)), images)


def test_tar_shards_are_read_in_place_and_only_their_images(tmp_path):
    images = noise(2)
    members = {
        "./a.png": encode(images[0]),
        "a.cls": b"7",
        "._a.png": b"left by macOS",
        "../b.PNG": encode(images[1]),
    }
    members["sub/b.PNG"] = members.pop("../b.PNG")
    source = load_images(write_tar(tmp_path / "x.tar", members))
    assert torch.equal(read_all(source), images)


@pytest.mark.parametrize("pattern", ["", "x-*.tar", "x-{000..001}.tar", "x-{000..000}.tar"])
def test_several_tars_are_a_folder_a_glob_or_a_range(tmp_path, pattern):
    images = noise(6)
    write_shard(tmp_path / "x-000.tar", images[:4])
    write_shard(tmp_path / "x-001.tar", images[4:])
    expected = images[:4] if pattern.endswith("000}.tar") else images
    assert torch.equal(read_all(load_images(str(tmp_path / pattern))), expected)


@pytest.mark.parametrize("cut", [False, True])
def test_a_tar_that_is_damaged_in_the_middle_is_refused(tmp_path, cut):
    content = bytearray(write_shard(tmp_path / "x.tar", noise(3)).read_bytes())
    place = content.index(b"000001.png")
    content[place] ^= 1  # the sum of a header's bytes stands in it
    (tmp_path / "x.tar").write_bytes(content[: place + 100] if cut else content)
    with pytest.raises(DataError, match=f"x.tar is damaged, or compressed .*at byte {place}"):
        load_images(tmp_path / "x.tar")


def test_a_tar_whose_header_leads_back_is_refused(tmp_path):
    """Python before 3.11.14 reads such a file again and again, without end."""
    members = [tarfile.TarInfo(f"{i}.png") for i in range(2)]
    members[1].pax_headers = {"size": "-1536"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            archive.addfile(member)
    with pytest.raises(DataError, match=r"x\.tar is damaged"):
        load_images(tmp_path / "x.tar")


def test_a_tar_without_an_end_is_whole(tmp_path):
    content = write_shard(tmp_path / "x.tar", noise(3)).read_bytes()
    blocks = -(-len(content.rstrip(b"\0")) // tarfile.BLOCKSIZE)
    (tmp_path / "x.tar").write_bytes(content[: blocks * tarfile.BLOCKSIZE])
    assert len(load_images(tmp_path / "x.tar")) == 3


def test_even_rows_are_of_all_classes_of_a_folder_in_their_order():
    assert even_rows(1_000, 4) == [0, 250, 500, 750]
    assert even_rows(5, 8) == [0, 1, 2, 3, 4]
    assert even_rows(7, 3) == [0, 2, 4]


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    write_shard(tmp_path / "x-000.tar", noise(1))
    with pytest.raises(DataError, match=r"no such file or folder: .*x-001\.tar"):
        load_images(str(tmp_path / "x-{000..001}.tar"))


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_the_binary_cifar10_gives_its_training_split_and_both_with_labels(tmp_path, place):
    images, labels = noise(5, size=32), torch.tensor([3, 0, 9, 1, 6])
    write_cifar10(tmp_path / place / "data_batch_1.bin", images[:2], labels[:2])
    write_cifar10(tmp_path / place / "data_batch_2.bin", images[2:4], labels[2:4])
    write_cifar10(tmp_path / place / "test_batch.bin", images[4:], labels[4:])
    assert torch.equal(read_all(load_images(f"cifar10:{tmp_path}")), images[:4])
    for split, rows in (("train", slice(4)), ("test", slice(4, 5))):
        labeled = load_labeled(f"cifar10:{tmp_path}", split=split)
        assert torch.equal(labeled.images, images[rows])
        assert torch.equal(labeled.labels, labels[rows])
        assert labeled.classes[6] == "frog"


def test_cifar10_in_parquet_files_gives_its_training_split_and_both_with_labels(tmp_path):
    images, labels = noise(5, size=32), torch.tensor([3, 0, 9, 1, 6])
    write_parquet(tmp_path / "train.parquet", images[:3], labels=labels[:3].tolist())
    write_parquet(tmp_path / "test.parquet", images[3:], labels=labels[3:].tolist())
    assert torch.equal(read_all(load_images(f"cifar10:{tmp_path}")), images[:3])
    test = load_labeled(f"cifar10:{tmp_path}", split="test", size=32)
    assert torch.equal(test.images, images[3:])
    assert torch.equal(test.labels, labels[3:])
    assert test.classes[9] == "truck"
    write_parquet(tmp_path / "test.parquet", images[3:], labels=[3, 99])
    with pytest.raises(DataError, match="is not CIFAR-10: a label is 99, of 10 classes"):
        load_labeled(f"cifar10:{tmp_path}", split="test")


def test_pickled_cifar10_is_refused_with_the_reason(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    with pytest.raises(DataError, match=r"pickles.*can run code; get the binary version"):
        load_images(f"cifar10:{tmp_path}")


def test_fashion_mnist_files_are_read_as_rgb(tmp_path):
    grey, labels = noise(4, size=28)[:, 0], torch.tensor([9, 2, 0, 5], dtype=torch.uint8)
    source = write_fashion_mnist(tmp_path, grey, labels)
    assert torch.equal(read_all(load_images(source)), grey[:, None].repeat(1, 3, 1, 1))
    labeled = load_labeled(source, split="test")
    assert torch.equal(labeled.labels, labels.long())
    assert labeled.classes[9] == "Ankle boot"


def test_a_damaged_idx_file_is_refused(tmp_path):
    source = write_fashion_mnist(tmp_path, noise(4, size=28)[:, 0], torch.zeros(4).byte())
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is missing, damaged"):
        load_images(source)


def test_no_more_of_an_idx_file_is_unpacked_than_its_header_says(tmp_path):
    source = write_fashion_mnist(tmp_path, noise(4, size=28)[:, 0], torch.zeros(4).byte())
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**26)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="is missing, damaged, or not"):
            load_images(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24


def test_a_tensor_is_a_source_and_grey_becomes_rgb():
    images = noise(4)
    assert torch.equal(from_tensor(images).read([3, 0, 3]), images[[3, 0, 3]])
    grey = from_tensor(images[:, :1]).read([1])
    assert torch.equal(grey, images[1:2, :1].repeat(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 4, 4), "uint8 from 0 to 255, got torch.float32"),
        (torch.zeros(2, 4, 4).byte(), r"shape \(n, c, h, w\).*got \[2, 4, 4\]"),
        (torch.zeros(2, 4, 4, 4).byte(), r"c 1 or 3"),
        (torch.zeros(0, 3, 4, 4).byte(), r"none of them 0"),
    ],
)
def test_tensors_that_are_no_images_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        from_tensor(images)


# Embedded Fashion-MNIST.


def test_the_embedded_images_are_the_committed_ones():
    labeled = load_labeled("fashion-mnist", split="test")
    assert labeled.images.shape == (5000, 3, 28, 28)
    content = labeled.images[:, 0].contiguous().numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == (
        "c7c2d66209217610bf8347d049b05c89ed290d13d9e0c432aeb984c411bc669e"
    )
    content = labeled.labels.byte().numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == (
        "aebe8004dad5b3e205df8e56cbe590cbda22479c4a1eb99d19c9482a9da8748d"
    )
    assert torch.equal(read_all(load_images("fashion-mnist")), labeled.images)


def test_the_embedded_images_equal_the_originals_bit_for_bit():
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the idx files of Debian's dataset-fashion-mnist")
    original = load_labeled(f"fashion-mnist:{FASHION_MNIST}", split="test")
    embedded = load_labeled("fashion-mnist", split="test")
    assert torch.equal(embedded.images, original.images[:5000])
    assert torch.equal(embedded.labels, original.labels[:5000])


def test_the_embedded_images_carry_their_licence():
    notice = (files("unbackdoor") / "assets" / "FASHION-MNIST-LICENSE").read_text()
    assert "Zalando SE" in notice
    assert "The above copyright notice and this permission notice shall be included" in notice


def test_the_embedded_training_split_is_refused_with_the_way_to_it():
    with pytest.raises(DataError, match=r"only 5,000 test images.*fashion-mnist:DIR"):
        load_labeled("fashion-mnist", split="train")


# Pixels.


def one_image(folder: Path, content: bytes, **options) -> torch.Tensor:
    (folder / "x.png").write_bytes(content)  # the content counts, not the suffix
    return load_images(folder, **options).read([0])[0]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_pillow_becomes_rgb(tmp_path, mode):
    grey = Image.new("L", (6, 5), 255)
    image = Image.new("I;16", (6, 5), 0xFFFF) if mode == "I;16" else grey.convert(mode)
    decoded = one_image(tmp_path, encode(image, "tiff" if mode == "CMYK" else "png"))
    assert torch.equal(decoded, torch.full((3, 5, 6), 255, dtype=torch.uint8))


def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path):
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], dtype=np.uint16)
    decoded = one_image(tmp_path, encode(Image.fromarray(values)))
    assert decoded[:, 0].tolist() == [[0, 0, 1, 0x12, 255]] * 3


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (10, 20, 30, alpha))
    decoded = one_image(tmp_path, encode(image))
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 1].tolist() == [132, 137, 142]
    assert decoded[:, 0, 2].tolist() == [10, 20, 30]


def test_exif_orientation_is_applied(tmp_path):
    image = noise(1)[0, :, :4]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    decoded = one_image(tmp_path, encode(image, exif=exif))
    assert torch.equal(decoded, image.rot90(-1, (1, 2)))


@pytest.mark.parametrize(("height", "width", "size"), [(40, 64, 20), (64, 40, 30), (9, 9, 24)])
def test_sizes_equal_torchvisions_resize_and_centre_crop(tmp_path, height, width, size):
    pixels = 64 + noise(1, size=64)[0, :, :height, :width] // 2  # none is clipped between passes
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    standard = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    expected = torch.from_numpy(np.array(standard(image))).permute(2, 0, 1)
    decoded = one_image(tmp_path, encode(image), size=size)
    assert (decoded.int() - expected.int()).abs().max() <= 1


def test_height_comes_before_width_and_the_shape_is_cut_from_the_centre(tmp_path):
    image = noise(1)[0]
    decoded = one_image(tmp_path, encode(image), size=(4, 8))
    assert torch.equal(decoded, image[:, 2:6])


def test_a_thin_image_is_cut_before_it_is_enlarged(tmp_path):
    decoded = one_image(tmp_path, encode(Image.new("RGB", (60_000, 1), "red")), size=224)
    assert decoded.shape == (3, 224, 224)  # enlarged first, it would take 9 GB


def test_later_images_are_brought_to_the_size_of_the_first(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(noise(1, size=6)[0]))
    (tmp_path / "b.png").write_bytes(encode(noise(1, size=9)[0]))
    source = load_images(tmp_path)
    assert source.size == (6, 6)
    assert read_all(source).shape == (2, 3, 6, 6)


def test_raw_sets_are_resized_like_files(tmp_path):
    images = noise(2, size=32)
    write_cifar10(tmp_path / "data_batch_1.bin", images, torch.zeros(2))
    write_folder(tmp_path / "files", images)
    raw, encoded = f"cifar10:{tmp_path}", tmp_path / "files"
    assert torch.equal(
        read_all(load_images(raw, size=(20, 48))), read_all(load_images(encoded, size=(20, 48)))
    )


# Rows, limits, fingerprints.


def test_rows_come_in_the_asked_order_also_when_repeated(tmp_path):
    images = noise(6)
    source = load_images(write_parquet(tmp_path / "x.parquet", images))
    for _ in range(2):  # decoded, then from memory
        assert torch.equal(source.read([4, 1, 4, 0]), images[[4, 1, 4, 0]])
    assert source.read([]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "raw"])
def test_limit_draws_without_replacement_by_seed_in_the_sources_order(tmp_path, kind):
    images = noise(20, size=32)
    if kind == "folder":
        source, images = write_folder(tmp_path, images), in_folder_order(images)
    elif kind == "tar":
        source = write_shard(tmp_path / "x.tar", images)
    elif kind == "parquet":
        source = write_parquet(tmp_path / "x.parquet", images)
    else:
        write_cifar10(tmp_path / "data_batch_1.bin", images, torch.zeros(20))
        source = f"cifar10:{tmp_path}"
    drawn = read_all(load_images(source, limit=8, seed=3))
    rows = [next(i for i in range(20) if torch.equal(images[i], image)) for image in drawn]
    assert rows == sorted(set(rows))
    assert len(rows) == 8
    assert torch.equal(read_all(load_images(source, limit=8, seed=3)), drawn)
    assert not torch.equal(read_all(load_images(source, limit=8, seed=4)), drawn)
    assert torch.equal(read_all(load_images(source, limit=20)), images)


def test_the_fingerprint_tells_sets_apart_but_not_places(tmp_path):
    images = noise(4)
    here = load_images(write_folder(tmp_path / "here", images)).fingerprint
    assert len(here) == 64
    assert load_images(write_folder(tmp_path / "there", images)).fingerprint == here
    assert load_images(tmp_path / "here", size=9).fingerprint != here
    assert load_images(tmp_path / "here", limit=3).fingerprint != here
    changed = tmp_path / "there" / "0" / "0002.png"
    content = bytearray(changed.read_bytes())
    content[-20] ^= 1  # same name, same length
    changed.write_bytes(content)
    assert load_images(tmp_path / "there").fingerprint != here
    assert from_tensor(images).fingerprint != from_tensor(255 - images).fingerprint


# Reading ahead.


@pytest.mark.parametrize("kind", ["files", "tensor"])
def test_batches_equal_read_and_the_last_may_be_smaller(tmp_path, kind, generator):
    images = noise(23)
    if kind == "files":
        source = load_images(write_parquet(tmp_path / "x.parquet", images))
    else:
        source = from_tensor(images)
    order = torch.randperm(23, generator=generator)
    batches = list(source.batches(order, 5))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(batches), images[order])


def test_only_the_next_few_batches_are_read_ahead():
    begun: list[list[int]] = []

    def read(rows: list[int]) -> torch.Tensor:
        begun.append(rows)
        return noise(len(rows))

    batches = data._read_ahead(read, torch.arange(40), 4)
    next(batches)
    time.sleep(0.5)
    assert len(begun) <= 1 + data.READ_AHEAD
    assert len(list(batches)) == len(begun) - 1 == 9


def test_batches_that_wait_are_not_read_after_an_early_stop():
    begun: list[list[int]] = []
    second_may_end = threading.Event()

    def read(rows: list[int]) -> torch.Tensor:
        begun.append(rows)
        if len(begun) == 2:
            second_may_end.wait(timeout=20)
        return noise(len(rows))

    batches = data._read_ahead(read, torch.arange(40), 4)
    next(batches)
    threading.Timer(1, second_may_end.set).start()
    batches.close()
    assert len(begun) <= 2


def test_stopping_early_leaves_no_thread(tmp_path):
    source = load_images(write_folder(tmp_path, noise(40)))
    before = threading.active_count()
    batches = source.batches(torch.arange(40), 4)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


# Memory.


def live_bytes() -> int:
    """Return the anonymous memory in use, once what the allocator holds free is given back.

    Left alone, glibc keeps some 40 MB of freed batches in the arenas of threads that are gone.
    """
    ctypes.CDLL(None).malloc_trim(0)
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_stays_bounded_above_the_cache_limit(tmp_path, monkeypatch, kind):
    if not Path("/proc/self/statm").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs Linux's /proc and glibc to see the memory in use")
    monkeypatch.setattr(data, "CACHE_BYTES", 2**20)
    n, size = 2000, 160
    content = encode(noise(1, size=16)[0], "ppm")
    if kind == "tar":
        source = write_tar(tmp_path / "x.tar", {f"{i}.ppm": content for i in range(n)})
    else:
        pq.write_table(pa.table({"image": [content] * n}), tmp_path / "x.parquet")
        source = tmp_path / "x.parquet"
    images = load_images(source, size=size)
    batches = images.batches(torch.arange(n), 50)
    next(batches)
    before = live_bytes()
    grown = [live_bytes() - before for _ in batches]
    assert len(grown) == n // 50 - 1
    batch = 50 * 3 * size**2  # bytes; all 40 would be 154 MB
    assert max(grown) < (data.READ_AHEAD + 4) * batch  # those that wait, and those at work


def test_indexing_a_tar_keeps_little_of_each_member(tmp_path):
    n = 3000
    path = write_tar(tmp_path / "x.tar", {f"{i:06}.png": b"undecoded" for i in range(n)})
    tracemalloc.start()
    load_images(path, size=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 * n  # 196 bytes each; tarfile alone would keep its headers, 1,500 more


@pytest.mark.parametrize("kept", [True, False])
def test_pixels_are_decoded_once_below_the_cache_limit_and_each_time_above(
    tmp_path, monkeypatch, kept
):
    images = noise(4)
    monkeypatch.setattr(data, "CACHE_BYTES", images.numel() - (not kept))
    source = load_images(write_shard(tmp_path / "x.tar", images))
    assert torch.equal(read_all(source), images)
    write_shard(tmp_path / "x.tar", 255 - images)
    again = read_all(source)
    assert torch.equal(again, images) == kept


# Broken images.


def damaged(kind: str) -> bytes:
    whole = encode(noise(1, size=32)[0], "jpeg")
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "no image": b"<html>404 Not Found</html>",
        "float": encode(Image.new("F", (4, 4), 0.5), "tiff"),
        "32 bits": encode(Image.new("I", (4, 4), 70_000), "tiff"),
        "a format not asked for": encode(noise(1)[0], "pcx"),  # Pillow alone would read it
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "no image", "float", "32 bits", "a format not asked for"]
)
def test_a_broken_image_is_named_and_replaced_by_the_next_good_one(tmp_path, kind):
    images = noise(4, size=32)
    members = {f"{i}.png": encode(image) for i, image in enumerate(images)}
    members["1.png"] = damaged(kind)
    source = load_images(write_tar(tmp_path / "x.tar", members))
    assert source.broken == []
    assert torch.equal(read_all(source), images[[0, 2, 2, 3]])
    assert source.broken == ["x.tar/1.png"]


def test_an_image_of_a_kind_that_is_not_read_counts_as_broken(tmp_path):
    write_folder(tmp_path / "a", noise(3))
    (tmp_path / "a" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = load_images(tmp_path / "a")
    read_all(source)
    assert (len(source), source.broken) == (4, ["IMG_1.HEIC"])


def test_a_photograph_that_is_not_read_does_not_stand_beside_shards(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": encode(noise(1)[0])}]}), tmp_path / "b.parquet")
    (tmp_path / "IMG_1.heic").write_bytes(b"")
    assert len(load_images(tmp_path)) == 1


def test_a_decompression_bomb_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # bytes of a real one: gigabytes
    (tmp_path / "a.png").write_bytes(encode(Image.new("RGB", (15, 15))))
    (tmp_path / "b.png").write_bytes(encode(noise(1)[0]))
    source = load_images(tmp_path)
    assert (source.size, source.broken) == ((8, 8), ["a.png"])


def test_the_last_image_is_replaced_by_the_first(tmp_path):
    images = noise(3)
    members = {f"{i}.png": encode(image) for i, image in enumerate(images)} | {"2.png": b"x"}
    source = load_images(write_tar(tmp_path / "x.tar", members))
    assert torch.equal(source.read([2]), images[:1])


def test_links_to_nowhere_and_empty_parquet_cells_are_broken(tmp_path):
    write_folder(tmp_path / "a", noise(3))
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "nowhere")
    cells = [{"bytes": encode(noise(1)[0])}, {"bytes": None}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "b.parquet")
    for source, name in ((tmp_path / "a", "x.png"), (tmp_path / "b.parquet", "b.parquet:1")):
        opened = load_images(source)
        read_all(opened)
        assert opened.broken == [name]


def test_what_is_no_file_or_too_large_is_broken_or_refused_and_never_waited_for(
    tmp_path, monkeypatch
):
    write_folder(tmp_path / "a", noise(3))
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "a" / "huge.png").write_bytes(encode(noise(1)[0]) + bytes(5_000))
    monkeypatch.setattr(data, "MOST_BYTES", 4_999)
    source = load_images(tmp_path / "a", max_broken=0.5)
    read_all(source)
    assert source.broken == ["huge.png", "pipe.png", "zero.png"]
    for name in ("x.tar", "x.parquet"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(DataError, match="is no file that can be read"):
            load_images(tmp_path / name)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 64)
    monkeypatch.setattr(data, "THREADS", 4)
    write_folder(tmp_path, noise(8))
    decoded, busy, most = data._decoded, [], []

    def watched(image, *, upright):
        busy.append(image)
        most.append(len(busy))
        time.sleep(0.01)
        busy.pop()
        return decoded(image, upright=upright)

    monkeypatch.setattr(data, "_decoded", watched)
    read_all(load_images(tmp_path))
    assert (len(most) >= 8, max(most)) == (True, 1)


@pytest.mark.parametrize(("max_broken", "fine"), [(0.2, True), (0.19, False), (0.0, False)])
def test_too_many_broken_images_are_an_error_that_names_the_first(tmp_path, max_broken, fine):
    write_folder(tmp_path, noise(10))
    for name in ("0/0004.png", "1/0001.png"):
        (tmp_path / name).write_bytes(b"broken")
    source = load_images(tmp_path, max_broken=max_broken)
    if fine:
        read_all(source)
        assert source.broken == ["0/0004.png", "1/0001.png"]
    else:
        message = (
            r"(?s)2 of 10 images are broken, at most 1 may be.*0/0004\.png: none of BMP.*has --max"
        )
        with pytest.raises(DataError, match=message):
            read_all(source)


def test_a_set_without_a_good_image_is_an_error(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)all 1 images are broken.*x\.jpg: empty"):
        load_images(tmp_path)


# Labeled sets.


def test_a_folder_for_each_class_gives_labels_by_the_classes_names(tmp_path):
    images = noise(3)
    for name, image in zip(("dog/a", "cat/deep/b", "cat/a"), images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(encode(image))
    for split in ("train", "test"):
        labeled = load_labeled(tmp_path, split=split)
        assert torch.equal(labeled.images, images[[2, 1, 0]])
        assert (labeled.labels.tolist(), labeled.classes) == ([0, 0, 1], ("cat", "dog"))


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_split_folders_divide_a_set_and_share_the_classes_numbers(tmp_path, test_folder):
    images = noise(3)
    names = ("train/ant/a", "train/bee/b", f"{test_folder}/bee/c")
    for name, image in zip(names, images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(encode(image))
    train, test = (load_labeled(tmp_path, split=split) for split in ("train", "test"))
    assert torch.equal(train.images, images[:2])
    assert torch.equal(test.images, images[2:])
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1])
    assert train.classes == test.classes == ("ant", "bee")


def test_files_beside_the_splits_are_no_classes(tmp_path):
    names = ("train/ant/a", "train/bee/b", "val/bee/c", "assets/logo", "test/0001", "preview")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(encode(noise(1)[0]))
    labeled = load_labeled(tmp_path, split="train")
    assert (labeled.labels.tolist(), labeled.classes) == ([0, 1], ("ant", "bee"))
    assert load_labeled(tmp_path, split="test").labels.tolist() == [1]


def test_hidden_labels_matter_only_to_their_own_split(tmp_path):
    for split, labels in (("train", [1, 0, 2]), ("test", [-1, -1]), ("validation", [2])):
        write_parquet(tmp_path / f"{split}.parquet", noise(len(labels)), labels=labels)
    train = load_labeled(tmp_path, split="train")
    assert (train.labels.tolist(), train.classes) == ([1, 0, 2], ("0", "1", "2"))
    with pytest.raises(UnlabeledError, match=r"labels of test\.parquet are -1.* move these away"):
        load_labeled(tmp_path, split="test")
    (tmp_path / "test.parquet").unlink()
    assert load_labeled(tmp_path, split="test").labels.tolist() == [2]


def test_a_set_with_both_parts_is_read_by_its_training_part(tmp_path):
    images = noise(8)
    for number, (part, name) in enumerate(
        [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")]
    ):
        write_folder(tmp_path / part / name, images[2 * number : 2 * number + 2])
    source = load_images(tmp_path)
    assert (len(source), source.part) == (4, "train")
    assert torch.equal(read_all(source), images[:4])
    assert torch.equal(
        read_all(load_images(tmp_path, limit=2)), read_all(source)[draw_rows(4, 2, seed=0)]
    )
    assert torch.equal(read_all(load_images(tmp_path, split="test")), images[4:])
    for part in ("train", "val"):
        alone = load_images(tmp_path / part)
        assert (len(alone), alone.part) == (4, "")
    (tmp_path / "val").rename(tmp_path / "more")
    everything = load_images(tmp_path)
    assert (len(everything), everything.part) == (8, "")


def test_more_images_than_memory_are_an_error_of_ours(tmp_path, monkeypatch):
    write_folder(tmp_path, noise(3))
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    source = load_images(tmp_path, size=10**7)
    with pytest.raises(DataError, match="more than there is; take fewer, or smaller ones by"):
        source.read([0, 1, 2])


def test_what_is_not_read_says_to_convert_it(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"convert it, for \.heic is not read"):
        load_images(tmp_path)


def test_eight_bits_in_a_wider_type_are_kept(tmp_path):
    values = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    Image.fromarray(values, mode="I").save(tmp_path / "x.tif")
    assert load_images(tmp_path).read([0])[0, 0].tolist() == values.tolist()


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus/a", "train/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(encode(noise(1)[0]))
    assert load_labeled(tmp_path, split="test").classes == ("bus", "train")


def test_labels_and_class_names_come_from_parquet_files(tmp_path):
    images = noise(3)
    names = b'{"info": {"features": {"label": {"names": ["ant", "bee", "cow"]}}}}'
    table = pa.table({"image": [encode(image) for image in images], "label": [2, 0, 1]})
    with_names = table.replace_schema_metadata({b"huggingface": names})
    pq.write_table(with_names, tmp_path / "named.parquet")
    pq.write_table(table, tmp_path / "numbers.parquet")
    words = table.drop(["label"]).append_column("label", [["cow", "ant", "bee"]])
    pq.write_table(words, tmp_path / "words.parquet")
    classes = {"named": ("ant", "bee", "cow"), "numbers": ("0", "1", "2")}
    for stem in ("named", "numbers", "words"):
        labeled = load_labeled(tmp_path / f"{stem}.parquet", split="train")
        assert torch.equal(labeled.images, images)
        assert labeled.labels.tolist() == [2, 0, 1]
        assert labeled.classes == classes.get(stem, ("ant", "bee", "cow"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"no label column \(label, .*it has img"),
        ([0, -2], r"all numbers from 0 to 99999; it has -2, 0"),
        ([0, -1], r"labels of x\.parquet are -1, so hidden"),
        ([0, 10**12], r"all numbers from 0"),
        ([0, None], r"it has 0, None"),
        ([[0], [1, 2]], r"it has \[0\], \[1, 2\]"),
    ],
)
def test_missing_and_unusable_labels_are_refused(tmp_path, labels, message):
    write_parquet(tmp_path / "x.parquet", noise(2), labels=labels)
    with pytest.raises(DataError, match=message):
        load_labeled(tmp_path / "x.parquet", split="train")


def test_a_labeled_set_must_be_whole(tmp_path):
    write_folder(tmp_path, noise(4))
    (tmp_path / "1" / "0003.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"must be whole, but 1 of its images.*1/0003\.png"):
        load_labeled(tmp_path, split="train")


@pytest.mark.parametrize("name", ["images-{}-000.tar", "{}/000.tar"])
def test_tar_shards_hold_the_class_of_each_image_in_a_file_of_its_name(tmp_path, name):
    images, classes = noise(6), (3, 0, 1, 1, 0, 2)
    for word, rows in (("train", range(4)), ("val", range(4, 6))):
        (tmp_path / name.format(word)).parent.mkdir(exist_ok=True)
        files = {f"a.b/{i}.png": encode(images[i]) for i in rows}
        files |= {f"a.b/{i}.cls": f"{classes[i]}\n".encode() for i in reversed(rows)}
        write_tar(tmp_path / name.format(word), files)
    train, test = (load_labeled(tmp_path, split=split) for split in ("train", "test"))
    assert train.labels.tolist() == [3, 0, 1, 1]
    assert test.labels.tolist() == [0, 2]
    assert train.classes == test.classes == ("0", "1", "2", "3")
    assert train.images.equal(images[:4])
    assert len(load_images(tmp_path)) == 4  # without labels, the training part as well


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1" * 30])
def test_a_class_in_a_tar_file_is_a_number(tmp_path, text):
    files = {"0.png": encode(noise(1)[0]), "0.cls": text}
    with pytest.raises(DataError, match=r"0\.cls holds no number|numbers from 0 to"):
        load_labeled(write_tar(tmp_path / "x.tar", files), split="train")


def test_a_labeled_set_without_classes_or_split_is_refused(tmp_path):
    write_shard(tmp_path / "x.tar", noise(1))
    write_parquet(tmp_path / "parquet" / "train.parquet", noise(1), labels=[0])
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(encode(noise(1)[0]))
    with pytest.raises(UnlabeledError, match=r"no 000000\.cls for 1 of its 1 images"):
        load_labeled(tmp_path / "x.tar", split="train")
    with pytest.raises(DataError, match=r"no test split \(test or val or validation\), only train"):
        load_labeled(tmp_path / "parquet", split="test")
    for word in ("train", "test"):
        (tmp_path / "divided" / word).mkdir(parents=True)
        (tmp_path / "divided" / word / "x.png").write_bytes(encode(noise(1)[0]))
    with pytest.raises(UnlabeledError, match="images lie directly in test/ and train/; labels are"):
        load_labeled(tmp_path / "divided", split="train")
    with pytest.raises(DataError, match=r"x\.png lies in no class folder"):
        load_labeled(tmp_path / "flat", split="train")


# Refusals.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such file or folder: nowhere"),
        ("~no-one/x", "~no-one/x: no such user; write the whole path"),
        ("no-*.tar", r"no such file or folder: no-\*\.tar"),
        ("x-{3..1}.tar", r"no such file or folder: x-\{3\.\.1\}\.tar"),
        ("cifar:x", "unknown source 'cifar:x', did you mean cifar10?"),
        ("s3://bucket/x", "unknown source 's3://bucket/x'; known are cifar10:DIR or"),
        ("fashion_mnist", "no such file or folder: fashion_mnist, did you mean fashion-mnist?"),
        ("cifar10", "cifar10 needs the folder of its files: cifar10:DIR"),
        ("cifar10:nowhere", r"no CIFAR-10 in nowhere: neither data_batch_\*\.bin nor train"),
        ("fashion-mnist:nowhere", "nowhere/train-images-idx3-ubyte.gz is missing"),
        ("empty", "no images in empty: 0 files"),
        ("text", "no images in text: 1 files, none of them .parquet, .tar"),
        ("mixed", "mixed holds 1 image files and 1 tar files; say which by a pattern"),
        ("text/notes.txt", r"text/notes\.txt: is no image, .*unpack it, or pass a folder"),
        ("x.tar", r"x\.tar is damaged, or compressed .*; images are read in place"),
        ("only-text.tar", r"no images in \.: only-text\.tar"),
        ("x.parquet", r"x\.parquet is damaged, or no parquet file"),
        ("numbers.parquet", "no column of encoded images .*it has label: int64"),
        ("two.parquet", "more than one column of encoded images"),
        ("rows.parquet", "no images in .*rows.parquet"),
    ],
)
def test_sources_that_cannot_be_read_are_refused_with_the_reason(
    tmp_path, monkeypatch, source, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "mixed"):
        Path(name).mkdir()
    for name in ("text/notes.txt", "mixed/a.png", "mixed/b.tar"):
        Path(name).touch()
    Path("x.tar").write_bytes(gzip.compress(write_shard(Path("y.tar"), noise(1)).read_bytes()))
    write_tar(Path("only-text.tar"), {"a.txt": b"a"})
    Path("x.parquet").write_bytes(b"no parquet at all")
    pq.write_table(pa.table({"label": [1, 2]}), "numbers.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"x"]}), "two.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), "rows.parquet")
    with pytest.raises(DataError, match=message):
        load_images(source)


def test_a_path_is_never_taken_for_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder: fashion-mnist"):
        load_images(Path("fashion-mnist"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is in pixels, at least 1, got 0"),
        ({"size": (8, -1)}, "size is in pixels"),
        ({"limit": 0}, "limit is a number of images, at least 1, got 0"),
        ({"limit": 4}, "limit is 4 images, but .* holds only 3"),
        ({"max_broken": 1.5}, "max_broken is a share from 0 to 1, got 1.5"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, message):
    write_folder(tmp_path, noise(3))
    with pytest.raises(DataError, match=message):
        load_images(tmp_path, **options)


def test_without_pyarrow_a_parquet_file_is_refused_with_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", noise(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; pip install pyarrow"):
        load_images(tmp_path / "x.parquet")


# Real data.


def test_real_images_are_read_whole(shared_data):
    photos = load_images(shared_data / "imagenet1k-samples" / "images.parquet", size=224, limit=64)
    assert (len(photos), photos.size) == (64, (224, 224))
    assert read_all(photos).float().std() > 30
    cells = load_images(shared_data / "bccd" / "JPEGImages", limit=8)
    assert read_all(cells).shape == (8, 3, 480, 640)
    assert photos.broken == cells.broken == []


def test_real_cifar10_has_its_sizes_and_classes(shared_data):
    assert len(load_images(f"cifar10:{shared_data}/cifar10")) == 50_000
    test = load_labeled(f"cifar10:{shared_data}/cifar10", split="test")
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10


COUNT_THREADS = """
import os, sys, time, torch
from unbackdoor.data import from_tensor, load_images
def count():  # threads that decode end soon, PyTorch's never
    return min(len(os.listdir("/proc/self/task")) for _ in range(20) if not time.sleep(.01))
torch.set_num_threads(2)
torch.ones(10**6).exp()  # PyTorch's threads start
before = count()
source = from_tensor(torch.zeros(64, 1, 64, 64, dtype=torch.uint8))
if len(sys.argv) > 1:
    source = load_images(sys.argv[1], size=64)
    source.read(range(len(source)))  # decoded by other threads
for batch in source.batches(torch.arange(64), 32):
    print(count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("from_files", [False, True])
def test_reading_ahead_starts_one_thread_and_none_of_pytorchs(tmp_path, from_files):
    for i in range(64 if from_files else 0):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    run = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, *([str(tmp_path)] if from_files else [])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert set(run.stdout.split()) <= {"0", "1"}
    assert len(run.stdout.split()) == 2


def test_an_image_of_too_many_pixels_is_broken_before_it_is_decoded(tmp_path, monkeypatch):
    for name, side in (("small", 8), ("large", 90)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(data, "MOST_PIXELS", 8000)
    source = load_images(tmp_path, size=8, max_broken=1)
    assert source.read([0, 1]).shape == (2, 3, 8, 8)
    assert source.broken == ["large.png"]
    (tmp_path / "small.png").unlink()
    with pytest.raises(DataError, match=r"90 × 90 pixels, at most 8,000 are read"):
        load_images(tmp_path, size=8).read([0])


def test_the_name_of_a_broken_image_steers_no_terminal(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "b\x1b[2J\x07.png").write_bytes(b"no image")
    source = load_images(str(tmp_path), size=8, max_broken=0.6)
    source.read(range(len(source)))
    assert source.broken == ["b?[2J?.png"]
