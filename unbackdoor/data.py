"""Image sources without labels for defending, and labeled sets for attacking and scoring.

What a SOURCE may be, wherever one is asked for:

===================================  ==========================================================
a folder                             all images in it, at any depth
``x.parquet``, or a folder of them   an image column as on the Hugging Face hub; needs pyarrow
``x.tar``, or a folder of them       every image in the archive; uncompressed, nothing is extracted
``x-*.tar``, ``x-{000..009}.tar``    several files (or parquet files, or images) by pattern
``cifar10:DIR``                      the training split: ``train*.parquet``, or the binary version
``fashion-mnist``                    5,000 of the test images, which come with this package
``fashion-mnist:DIR``                the training split, from the four idx ``.gz`` files
===================================  ==========================================================

Hidden files are ignored, links are followed, order is by name. Every image becomes RGB: grey is
repeated, transparency is laid over white, of 16 bits the upper 8 are kept, of several frames the
first; EXIF orientation is applied. Where ``size`` asks for other pixels than the file has, the
image's largest centred part of that shape is scaled to it (bicubic, antialiased).
"""

import contextlib
import difflib
import gzip
import hashlib
import importlib
import importlib.resources
import io
import itertools
import json
import math
import os
import re
import tarfile
import tempfile
import threading
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unbackdoor.errors import DataError, UnlabeledError, printable
from unbackdoor.settings import SCHEMES, at_home
from unbackdoor.types import Labels, RawImages

CACHE_BYTES = 2**30  # decoded pixels stay in memory when all of a source's fit in this many bytes
HASHED_BYTES = 2**26  # a fingerprint covers the contents when all files together are this small
READ_AHEAD = 2  # batches
THREADS = min(8, os.cpu_count() or 1)

WILD = {"*", "?", "["}  # what makes a path a pattern
IMAGE_SUFFIXES = ["bmp", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"]
UNREAD_SUFFIXES = ["avif", "heic", "heif", "jp2", "jxl"]  # of images that count as broken
# Pillow knows more formats, one of which (EPS) hands the file to an interpreter.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 80_000_000  # of one image, which may take a gigabyte while it is decoded
LARGE = 10_000_000  # pixels; of images from here on, one is decoded at a time
MOST_BYTES = 2**29  # of one image's file
KIND_OF_SUFFIX = {"parquet": "parquet", "tar": "tar"}
KIND_OF_SUFFIX |= dict.fromkeys(IMAGE_SUFFIXES + UNREAD_SUFFIXES, "image")
MAX_CLASSES = 100_000
HIDDEN = -1  # the label of a test image whose class is nobody's business
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
WORDS_FOR_SPLIT = {"train": ("train",), "test": ("test", "val", "validation")}
SPLIT_WORDS = {*itertools.chain(*WORDS_FOR_SPLIT.values())}

Classes = tuple[str, ...]
CIFAR10_CLASSES: Classes = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")
FASHION_MNIST_CLASSES: Classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
FASHION_MNIST_CLASSES += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

ONE_AT_A_TIME = threading.Lock()

Split = Literal["train", "test"]
Integers = NDArray[np.int64]


@runtime_checkable
class ImageSource(Protocol):
    """Unlabeled images of one size, by row number."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what identifies the images; equal for the same images at another place.

        Of files: the size, and every image's name (relative to the source) and length in bytes,
        and the bytes as well when all of them are at most ``HASHED_BYTES``. Of a tensor: its shape
        and contents, and the size.
        """

    @property
    def broken(self) -> list[str]:
        """Names of the images that could not be decoded so far, in order."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, rows: Sequence[int]) -> RawImages:
        """Return the images ``rows`` in that order, on the CPU, shape ``(len(rows), 3, h, w)``.

        A broken image is replaced by the next good one.

        Raises:
            DataError: If too many images turn out to be broken.
        """

    def batches(self, order: Tensor, batch_size: int) -> Iterator[RawImages]:
        """Yield the images ``order``, ``batch_size`` at a time; the last batch may be smaller.

        The next few batches are decoded in the background meanwhile.

        Raises:
            DataError: As ``read``.
        """


class LabeledImages(NamedTuple):
    """Images, the class number of each, and the classes' names."""

    images: RawImages
    labels: Labels
    classes: Classes

    def take(self, rows: Tensor | slice) -> "LabeledImages":
        """Return these rows, in their order; the classes stay."""
        return self._replace(images=self.images[rows], labels=self.labels[rows])


class Sets(NamedTuple):
    """All labeled images of a source."""

    train: LabeledImages
    test: LabeledImages


class Rows(NamedTuple):
    """Row numbers of a labeled set by role; no row has two."""

    unlabeled: Tensor
    probe: Tensor
    rest: Tensor


def load_images(
    source: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_broken: float = 0.01,
    split: Split | None = None,
) -> ImageSource:
    """Open unlabeled images; labels that the source may have are not read.

    Memory does not grow with the number of images, but for their names and places (about 200
    bytes each) and for up to ``CACHE_BYTES`` of pixels. The images of a parquet file are copied to
    an unnamed temporary file once.

    Args:
        source: See the top of this module; a ``Path`` is never taken for a scheme.
        size: Side, or height and width, in pixels; by default those of the first image taken.
        limit: Take this many images, drawn without replacement and kept in the source's order.
        seed: Of that draw.
        max_broken: Share of the images that may be broken; a single one always may.
        split: Part of a source that is divided, as in ``load_labeled``. By default the training
            images, also of a folder that has test images as well, all of a folder or file that has
            not both, and the embedded test images.

    Raises:
        DataError: If the source does not exist, is not understood or holds no images, or not that
            split; if ``limit`` exceeds it; if the first images are broken beyond ``max_broken``; if
            an argument is out of range; or if pyarrow is needed and missing.
    """
    pixels = _check_size(size)
    if not 0 <= max_broken <= 1:
        raise DataError(f"max_broken is a share from 0 to 1, got {max_broken}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is a number of images, at least 1, got {limit}")

    def draw(count: int) -> Integers:
        if limit is None:
            return np.arange(count)
        if limit > count:
            raise DataError(f"limit is {limit} images, but {source} holds only {count}")
        return draw_rows(count, limit, seed=seed)

    scheme, place = _parse(source)
    part = split or ("test" if (scheme, place) == ("fashion-mnist", "") else "train")
    unpacked = _unpacked(scheme, place, split=part)
    if unpacked is not None:
        rows = torch.from_numpy(draw(len(unpacked.images)))
        return TensorImages(unpacked.images[rows], size=pixels)
    files = _find(place)
    everything = len(files.names)
    if scheme or split or _has_both_parts(files):
        files = _of_split(files, part)
    of_it = part if len(files.names) < everything else ""
    return FileImages(_index(files, draw), size=pixels, max_broken=max_broken, part=of_it)


def draw_rows(count: int, limit: int, *, seed: int) -> Integers:
    """Return ``limit`` of ``count`` row numbers, drawn without replacement, in order."""
    generator = torch.Generator().manual_seed(seed)
    return np.sort(torch.randperm(count, generator=generator)[:limit].numpy())


def even_rows(count: int, most: int) -> list[int]:
    """Return up to ``most`` of ``count`` row numbers, evenly over all of them.

    A folder is often in the order of its classes; its first images are of one.
    """
    taken = min(count, most)
    return [place * count // taken for place in range(taken)]


def split_rows(count: int, *, unlabeled: int, probe: int, seed: int) -> Rows:
    """Split ``count`` row numbers into disjoint parts: for a defense, for a probe, and the rest.

    The unlabeled rows are those that ``load_images`` takes with this ``limit`` and ``seed``, so
    that a repair from the command line and its scores agree on them.

    Raises:
        DataError: If there are fewer rows than asked for.
    """
    if unlabeled + probe > count:
        raise DataError(
            f"{unlabeled} unlabeled and {probe} probe images are more than the {count} there are"
        )
    drawn = torch.from_numpy(draw_rows(count, unlabeled, seed=seed))
    is_left = torch.ones(count, dtype=torch.bool)
    is_left[drawn] = False
    left = is_left.nonzero().squeeze(1)
    left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))]
    return Rows(drawn, left[:probe], left[probe:])


def from_tensor(images: Tensor) -> ImageSource:
    """Wrap images that are in memory already, uint8, shape ``(n, c, h, w)``, c 1 or 3.

    Raises:
        DataError: If type or shape are others, or there is no image.
    """
    if images.dtype != torch.uint8:
        raise DataError(f"images are uint8 from 0 to 255, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"images have the shape (n, c, h, w), c 1 or 3, none of them 0; got {[*images.shape]}"
        )
    return TensorImages(images.cpu())


def load_labeled(
    source: str | Path, *, split: Split, size: int | tuple[int, int] | None = None
) -> LabeledImages:
    """Load a whole labeled set into memory.

    Beside ``cifar10:`` and ``fashion-mnist`` a source may be a parquet file or a folder of them,
    with a label column; tar shards with a ``KEY.cls`` for each ``KEY.jpg``, which holds the number
    of its class, as in WebDataset; or a folder with one folder for each class. A source that has
    ``train`` and ``test`` (or ``val``, ``validation``) folders, or shards whose names have one of
    these words, as ``train-000.tar``, is divided by them; one that has neither is given whole for
    either split.

    Args:
        source: See above.
        split: Which part of it.
        size: As in ``load_images``.

    Raises:
        DataError: As ``load_images``; and if the split is missing, or if any image is broken.
        UnlabeledError: If there are no labels.
    """
    pixels = _check_size(size)
    scheme, place = _parse(source)
    unpacked = _unpacked(scheme, place, split=split)
    if unpacked is not None:
        resized = TensorImages(unpacked.images, size=pixels)
        return unpacked._replace(images=resized.read(range(len(resized))))

    everything = _find(place)
    files = _of_split(everything, split)
    by_kind = {"image": _folder_labels, "tar": _tar_labels, "parquet": _parquet_labels}
    labels, classes = by_kind[files.kind](files, everything)
    images = FileImages(_index(files, np.arange), size=pixels, max_broken=1)
    decoded = images.read(range(len(images)))
    if images.broken:
        first = ", ".join(images.broken[:5])
        raise DataError(
            f"{source}: a labeled set must be whole, but {len(images.broken)} of its images are"
            f" broken, first {first}; remove them"
        )
    if scheme and labels.max() >= len(CIFAR10_CLASSES):
        raise DataError(f"{source} is not CIFAR-10: a label is {labels.max()}, of 10 classes")
    return LabeledImages(decoded, labels, CIFAR10_CLASSES if scheme else classes)


def load_both(source: str, *, size: int) -> Sets:
    """Load the training and the test part of a labeled set; errors are ``load_labeled``'s."""
    return Sets(*(load_labeled(source, split=part, size=size) for part in ("train", "test")))


class TensorImages:
    """An ``ImageSource`` of images in memory; other sizes and grey are converted on reading."""

    def __init__(self, images: RawImages, *, size: tuple[int, int] | None = None):
        self._images = images
        self.size = size or (images.shape[2], images.shape[3])
        self.broken: list[str] = []

    @cached_property
    def fingerprint(self) -> str:
        """See ``ImageSource``."""
        digest = hashlib.sha256(repr(([*self._images.shape], self.size)).encode())
        digest.update(self._images.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        """See ``ImageSource``."""
        return len(self._images)

    def read(self, rows: Sequence[int]) -> RawImages:
        """See ``ImageSource``."""
        images = self._images.numpy()[np.asarray(rows, dtype=np.int64)]
        images = images.repeat(3 // images.shape[1], axis=1)
        if images.shape[2:] == self.size:
            return torch.from_numpy(images)
        out = torch.empty(len(images), 3, *self.size, dtype=torch.uint8)
        for image, place in zip(images.transpose(0, 2, 3, 1), out.numpy(), strict=True):
            place[:] = _fit(Image.fromarray(image), self.size)
        return out

    def batches(self, order: Tensor, batch_size: int) -> Iterator[RawImages]:
        """See ``ImageSource``."""
        return _read_ahead(self.read, order, batch_size)


class _Index(NamedTuple):
    """Images in files: for each its name, its length, and a way to its bytes.

    ``read`` may be called from several threads; what cannot be read is empty.
    """

    names: list[str]
    lengths: Integers
    read: Callable[[int], bytes]


class FileImages:
    """An ``ImageSource`` that decodes on demand and keeps pixels where ``CACHE_BYTES`` allow.

    Attributes:
        part: Which one these images are of a source that is divided; empty for all of a source.
    """

    def __init__(
        self, index: _Index, *, size: tuple[int, int] | None, max_broken: float, part: str = ""
    ):
        self.part = part
        self._index = index
        self._max_broken = max(1, int(max_broken * len(index.names)))
        self._reasons: dict[int, str] = {}  # of the broken images, by row
        if size is None:
            width, height = self._next_good(0).size
            size = height, width
        self.size = size
        self.fingerprint = self._hash()
        self._cache: Tensor | None = None
        if len(self) * 3 * size[0] * size[1] <= CACHE_BYTES:
            self._cache = torch.empty(len(self), 3, *size, dtype=torch.uint8)
        self._cached = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        """See ``ImageSource``."""
        return len(self._index.names)

    @property
    def broken(self) -> list[str]:
        """See ``ImageSource``."""
        return [_printable(self._index.names[row]) for row in sorted(self._reasons)]

    def read(self, rows: Sequence[int]) -> RawImages:
        """See ``ImageSource``."""
        wanted = np.asarray(rows, dtype=np.int64)
        if self._cache is None:
            out = _room_for(len(wanted), self.size)
            self._decode(wanted, out, np.arange(len(wanted)))
            return out
        missing = np.unique(wanted[~self._cached[wanted]])
        self._decode(missing, self._cache, missing)
        self._cached[missing] = True
        return torch.from_numpy(self._cache.numpy()[wanted])

    def batches(self, order: Tensor, batch_size: int) -> Iterator[RawImages]:
        """See ``ImageSource``."""
        return _read_ahead(self.read, order, batch_size)

    def _decode(self, rows: Integers, out: Tensor, places: Integers) -> None:
        """Write the images ``rows`` to ``out[places]``."""
        pixels = out.numpy()

        def work(part: Integers) -> None:
            for i in part:
                pixels[places[i]] = _fit(self._next_good(int(rows[i])), self.size)

        if len(rows) > 0:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(work, np.array_split(np.arange(len(rows)), THREADS)))

    def _next_good(self, row: int) -> Image.Image:
        """Return image ``row``, or the first one after it (the last is followed by the first)."""
        for candidate in itertools.chain(range(row, len(self)), range(row)):
            if candidate in self._reasons:
                continue
            try:
                return open_image(self._index.read(candidate))
            except MemoryError:
                raise
            except UnidentifiedImageError:  # its text is a place in memory
                kind = _suffix(self._index.names[candidate])
                self._reasons[candidate] = f"none of {', '.join(IMAGE_FORMATS)}" + (
                    f"; convert it, for .{kind} is not read" if kind in UNREAD_SUFFIXES else ""
                )
            except Exception as error:  # Pillow raises nearly anything on a damaged file
                self._reasons[candidate] = str(error)
            if len(self._reasons) > self._max_broken:
                break
        raise DataError(self._complaint())

    def _complaint(self) -> str:
        reasons = sorted(self._reasons.items())
        head = f"{len(reasons)} of {len(self)} images are broken, at most {self._max_broken} may be"
        if len(reasons) == len(self):
            head = f"all {len(self)} images are broken"
        listed = [f"  {_printable(self._index.names[row])}: {why}" for row, why in reasons[:5]]
        advice = [] if len(reasons) == len(self) else ["Remove them; purify also has --max-broken."]
        return "\n".join([f"{head}; the first are", *listed, *advice])

    def _hash(self) -> str:
        digest = hashlib.sha256(repr(self.size).encode())
        small = self._index.lengths.sum() <= HASHED_BYTES
        for row, (name, length) in enumerate(zip(*self._index[:2], strict=True)):
            digest.update(json.dumps([name, int(length)]).encode())
            if small:
                digest.update(self._index.read(row))
        return digest.hexdigest()


def _room_for(count: int, size: tuple[int, int]) -> Tensor:
    try:
        return torch.empty(count, 3, *size, dtype=torch.uint8)
    except RuntimeError as error:  # how PyTorch says that there is no memory
        raise DataError(
            f"{count} images of {size[0]} × {size[1]} pixels take {3 * count * math.prod(size):,} "
            "bytes, more than there is; take fewer, or smaller ones by --size"
        ) from error


def _read_ahead(
    read: Callable[[list[int]], RawImages], order: Tensor, batch_size: int
) -> Iterator[RawImages]:
    """Read the next batches in another thread.

    There ``read`` has to leave operations to NumPy: PyTorch would start more threads than there are
    processors, and all of its operations, in the first thread too, would take half as long again.
    """
    pending: deque[Future[RawImages]] = deque()
    with ThreadPoolExecutor(1) as reader:
        try:
            for rows in order.split(batch_size):
                pending.append(reader.submit(read, rows.tolist()))
                if len(pending) > READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # when the caller stops early, too
            for batch in pending:
                batch.cancel()


def open_image(encoded: bytes, *, upright: bool = True) -> Image.Image:
    """Decode one image to RGB; any exception means that it is broken.

    Args:
        upright: Turn it as its EXIF says; otherwise pixels are as they are stored.
    """
    if not encoded:
        raise ValueError("empty, or cannot be read")
    image: Image.Image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels, at most {MOST_PIXELS:,} are read")
    large = image.width * image.height >= LARGE
    with ONE_AT_A_TIME if large else contextlib.nullcontext():
        return _decoded(image, upright=upright)


def _decoded(image: Image.Image, *, upright: bool) -> Image.Image:
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("pixels of more than 16 bits, whose range is not known")
        if image.mode == "I" and values.max() <= 0xFF:  # 8 bits in a wider type
            return Image.fromarray(values.astype(np.uint8)).convert("RGB")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _fit(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale the largest centred part with the shape of ``size`` to it; return ``(3, h, w)``."""
    height, width = size
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left = max(0.0, (image.width - scale * width) / 2)  # max: against rounding below zero
        top = max(0.0, (image.height - scale * height) / 2)
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and min(pair) < 1:
        raise DataError(f"size is in pixels, at least 1, got {size}")
    return pair


def _printable(name: str) -> str:
    return printable(name.encode("utf-8", "backslashreplace").decode())


# Finding files.


class _Files(NamedTuple):
    """Files of one kind: "image", "parquet" or "tar"; names are relative to ``root``, sorted."""

    root: Path
    names: list[str]
    kind: str


def _parse(source: str | Path) -> tuple[str, str]:
    """Split ``source`` into a scheme, empty for paths, and what follows it."""
    text = str(source)
    if isinstance(source, Path) or (Path(text).exists() and text not in SCHEMES):
        return "", text
    scheme, colon, place = text.partition(":")
    if scheme in SCHEMES:
        if scheme == "cifar10" and not place:
            raise DataError("cifar10 needs the folder of its files: cifar10:DIR")
        return scheme, place
    if colon and re.fullmatch(r"[A-Za-z][\w+-]+", scheme):  # two letters: C: is a drive
        known = " or ".join(f"{name}:DIR" for name in SCHEMES)
        raise DataError(f"unknown source {text!r}{_nearest(scheme)}; known are {known}, and paths")
    return "", text


def _nearest(word: str) -> str:
    matches = difflib.get_close_matches(word, SCHEMES, n=1)
    return f", did you mean {matches[0]}?" if matches else ""


def check_there(source: str) -> None:
    """Look whether there is anything at ``source``, without reading it.

    Raises:
        DataError: If there is not.
    """
    scheme, place = _parse(source)
    path = at_home(place)
    if scheme and place and not path.is_dir():
        raise DataError(f"{source}: no such folder")
    if not scheme and not path.exists():
        _find(place)


def _find(source: str) -> _Files:
    """List the files of a folder, a file or a pattern."""
    path = at_home(source)
    if path.is_dir():
        return _one_kind(path, _walk(path))
    if path.is_file():
        if _suffix(path.name) not in KIND_OF_SUFFIX:
            raise DataError(
                f"{path}: is no image, .parquet or .tar file; unpack it, or pass a folder"
            )
        return _one_kind(path.parent, [path.name])
    paths = sorted({match for pattern in _braces(str(path)) for match in _matches(pattern)})
    root = Path(os.path.commonpath([match.parent for match in paths]))
    return _one_kind(root, [match.relative_to(root).as_posix() for match in paths])


def _walk(root: Path) -> list[str]:
    """Return all visible files below ``root``; a folder that links lead to twice counts once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error

    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        place = Path(folder).relative_to(root)
        names += [(place / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _braces(pattern: str) -> list[str]:
    """Write ``x-{08..10}.tar`` out as x-08.tar, x-09.tar, x-10.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None or int(match[1]) > int(match[2]):
        return [pattern]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rest = _braces(pattern[match.end() :])
    return [pattern[: match.start()] + number + tail for number in numbers for tail in rest]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    found = [path] if path.is_file() else []
    if not found and WILD & set(pattern):
        root = Path(path.anchor)
        if any("**" in part and part != "**" for part in path.parts):
            raise DataError(f"{pattern}: ** is an entire part of a path, as in x/**/*.jpg")
        dotted = [part for part in path.parts if part[0] == "."]  # asked for by name

        def is_hidden(part: str) -> bool:
            return part[0] == "." and not any(fnmatch(part, asked) for asked in dotted)

        found = [
            match
            for match in root.glob(str(path.relative_to(root)))
            if match.is_file() and not any(map(is_hidden, match.parts))
        ]
    if not found:
        raise DataError(f"no such file or folder: {pattern}{_nearest(pattern)}")
    return found


def _suffix(name: str) -> str:
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if stem else ""


def _one_kind(root: Path, names: list[str]) -> _Files:
    groups: dict[str, list[str]] = {}
    for name in names:
        if _suffix(name) in KIND_OF_SUFFIX:
            groups.setdefault(KIND_OF_SUFFIX[_suffix(name)], []).append(name)
    if len(groups) > 1 and {_suffix(name) for name in groups.get("image", [])} <= {
        *UNREAD_SUFFIXES
    }:
        groups.pop("image", None)  # photographs beside shards
    if not groups:
        raise DataError(
            f"no images in {root}: {len(names)} files, none of them .parquet, .tar (not compressed)"
            f" or an image (.{', .'.join(IMAGE_SUFFIXES)})"
        )
    if len(groups) > 1:
        counts = " and ".join(f"{len(group)} {kind} files" for kind, group in groups.items())
        raise DataError(f"{root} holds {counts}; say which by a pattern, such as {root}/*.jpg")
    ((kind, chosen),) = groups.items()
    return _Files(root, chosen, kind)


def _of_split(files: _Files, split: Split) -> _Files:
    """Keep the files of ``split``; all of them if ``files`` are not divided."""
    found: dict[str, list[str]] = {}
    for name in files.names:
        found.setdefault(_split_word(name), []).append(name)
    if not found.keys() - {""}:
        return files
    for word in WORDS_FOR_SPLIT[split]:
        if word in found:
            return files._replace(names=found[word])
    there = ", ".join(sorted(found.keys() - {""}))
    words = " or ".join(WORDS_FOR_SPLIT[split])
    raise DataError(f"{files.root} has no {split} split ({words}), only {there}")


def _has_both_parts(files: _Files) -> bool:
    words = {_split_word(name) for name in files.names}
    return "train" in words and not words.isdisjoint(WORDS_FOR_SPLIT["test"])


def _split_word(name: str) -> str:
    """Return "train" for train/class/x.jpg, train-000.tar, train/000.tar; "" where none is."""
    *folders, file = name.split("/")
    if _suffix(name) in ("parquet", "tar"):
        words = [*re.split(r"[-_.]", file), *folders[:1]]
    else:  # train/x.jpg is an image of the class "train", of which some sets have one
        words = folders[:1] if len(folders) > 1 else []
    return next((word for word in words if word in SPLIT_WORDS), "")


# Indexing files: which bytes are an image. Nothing is decoded here.

Draw = Callable[[int], Integers]  # number of images -> rows to take, ascending


def _index(files: _Files, draw: Draw) -> _Index:
    by_kind = {"image": _index_folder, "tar": _index_tars, "parquet": _index_parquet}
    return by_kind[files.kind](files, draw)


def _index_folder(files: _Files, draw: Draw) -> _Index:
    names: list[str] = [files.names[row] for row in draw(len(files.names))]

    lengths = np.array([_length(files.root / name) for name in names])

    def read(row: int) -> bytes:
        return _bytes_at(files.root / names[row], 0, int(lengths[row]))

    return _Index(names, lengths, read)


def _length(path: Path) -> int:
    """Return the bytes of a file; none of what is no file: a device, a pipe, a link to nowhere."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _index_tars(files: _Files, draw: Draw) -> _Index:
    names: list[str] = []
    places = array("q")  # number of the tar file, offset, length; and so on
    for number, shard in enumerate(files.names):
        for member in _members(files.root / shard):
            if _is_visible_image(member.name):
                names.append(f"{shard}/{member.name}")
                places.extend((number, member.offset_data, member.size))
    if not names:
        raise DataError(f"no images in {files.root}: {', '.join(files.names[:5])}")
    rows = draw(len(names))
    chosen = np.array(places).reshape(-1, 3)[rows]

    def read(row: int) -> bytes:
        number, offset, length = chosen[row].tolist()
        return _bytes_at(files.root / files.names[number], offset, length)

    return _Index([names[row] for row in rows], chosen[:, 2], read)


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    """Return a part of a file; nothing where it cannot be read, or is more than an image has."""
    if not 0 < length <= MOST_BYTES or not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError:
        return b""


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar file."""
    if not path.is_file():
        raise DataError(f"{path} is no file that can be read")
    end = -1
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= end:  # or it would lead back without end
                    raise tarfile.ReadError(f"a header that leads back to byte {archive.offset}")
                end = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # or all headers stay in memory
                if member.isreg():
                    yield member
        if _bytes_at(path, archive.offset, tarfile.BLOCKSIZE).strip(b"\0"):
            # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} is damaged, or compressed ({error}); images are read in place, so decompress "
            "it first"
        ) from error


def _is_visible_image(name: str) -> bool:
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return KIND_OF_SUFFIX.get(_suffix(name)) == "image" and not hidden


def _index_parquet(files: _Files, draw: Draw) -> _Index:
    """Copy the drawn images to a temporary file, since a row cannot be read alone in place."""
    count = 0
    for name in files.names:
        with _parquet(files.root / name) as parquet:
            count += parquet.metadata.num_rows
    if count == 0:
        raise DataError(f"no images in {files.root}: {', '.join(files.names[:5])}")
    rows = draw(count)
    names: list[str] = []
    ends = array("q", [0])
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed when nobody holds its reader any more
    lock = threading.Lock()

    def read(row: int) -> bytes:
        with lock:
            copy.seek(ends[row])
            return bytes(copy.read(ends[row + 1] - ends[row]))

    weakref.finalize(read, copy.close)
    for name, encoded in _parquet_images(files, np.isin(np.arange(count), rows)):
        names.append(name)
        ends.append(ends[-1] + len(encoded))
        try:
            copy.write(encoded)
        except OSError as error:
            raise DataError(f"no room in {tempfile.gettempdir()} ({error}); set TMPDIR") from error
    return _Index(names, np.diff(ends), read)


def _parquet_images(files: _Files, wanted: NDArray[np.bool_]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the ``wanted`` rows; at most 64 of them are in memory."""
    row = 0
    for name in files.names:
        first = row
        with _parquet(files.root / name) as parquet:
            column = _image_column(parquet.schema_arrow, files.root / name)
            for group in range(parquet.num_row_groups):
                end = row + parquet.metadata.row_group(group).num_rows
                if not wanted[row:end].any():
                    row = end
                    continue
                for batch in parquet.iter_batches(64, row_groups=[group], columns=[column]):
                    for cell in batch.column(0).to_pylist():
                        encoded = cell["bytes"] if isinstance(cell, dict) else cell
                        if wanted[row]:
                            yield f"{name}:{row - first}", encoded or b""
                        row += 1


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a parquet file; its errors become ours."""
    if not path.is_file():
        raise DataError(f"{path} is no file that can be read")
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged, or no parquet file: {error}") from error


def _image_column(schema: Any, path: Path) -> str:
    """Return the path of the column of binary values, or of structs with binary "bytes"."""
    binary = ("binary", "large_binary")
    found: dict[str, str] = {}
    for field in schema:
        is_struct = str(field.type).startswith("struct")
        parts = {part.name: str(part.type) for part in field.type} if is_struct else {}
        if str(field.type) in binary:
            found[field.name] = field.name
        elif parts.get("bytes") in binary:
            found[field.name] = f"{field.name}.bytes"
    candidates: list[str] = [name for name in ("image", "img") if name in found] or list(found)
    if len(candidates) != 1:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        count = "no column" if not candidates else "more than one column"
        raise DataError(f"{path} has {count} of encoded images (call it image); it has {columns}")
    return found[candidates[0]]


# Labels. ``everything`` has the files of all splits, so that classes have the same numbers in each.


def _folder_labels(files: _Files, everything: _Files) -> tuple[Labels, Classes]:
    def class_of(name: str) -> str:
        parts = name.split("/")[1 if _split_word(name) else 0 :]
        if len(parts) < 2:
            raise UnlabeledError(f"{files.root / name} lies in no class folder")
        return parts[0]

    divided = [name for name in everything.names if _split_word(name)]  # others lie beside them
    classes = sorted({class_of(name) for name in divided or everything.names})
    if set(classes) <= SPLIT_WORDS:
        raise UnlabeledError(
            f"{files.root}: images lie directly in {' and '.join(f'{name}/' for name in classes)}; "
            "labels are the folders below, one for each class"
        )
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[class_of(name)] for name in files.names]), tuple(classes)


def _tar_labels(files: _Files, everything: _Files) -> tuple[Labels, Classes]:
    values = {name: _tar_classes(everything.root / name) for name in everything.names}
    return _numbered(files, values)


def _tar_classes(path: Path) -> list[int]:
    """Return the class of each image of a tar file, which stands in a file of the same name."""
    images: list[str] = []
    classes: dict[str, int] = {}
    for member in _members(path):
        key = member.name.removesuffix(PurePosixPath(member.name).name)
        key += PurePosixPath(member.name).name.partition(".")[0]
        if _is_visible_image(member.name):
            images.append(key)
        elif _suffix(member.name) == "cls":
            text = _bytes_at(path, member.offset_data, min(20, member.size))
            if not text.strip().isdigit():
                name = _printable(member.name)
                raise DataError(f"{path}: {name} holds no number of a class, but {text!r}")
            classes[key] = int(text)
    if missing := [key for key in images if key not in classes]:
        raise UnlabeledError(
            f"{path} has no {_printable(missing[0])}.cls for {len(missing)} of its {len(images)} "
            "images; labels of tar shards are such files, as in WebDataset"
        )
    return [classes[key] for key in images]


def _parquet_labels(files: _Files, everything: _Files) -> tuple[Labels, Classes]:
    values: dict[str, list[Any]] = {}
    named: Classes = ()
    for name in everything.names:
        with _parquet(files.root / name) as parquet:
            schema = parquet.schema_arrow
            column = next((word for word in LABEL_COLUMNS if word in schema.names), None)
            if column is None:
                raise UnlabeledError(
                    f"{files.root / name} has no label column ({', '.join(LABEL_COLUMNS)});"
                    f" it has {', '.join(schema.names)}"
                )
            values[name] = parquet.read(columns=[column]).column(0).to_pylist()
            named = _class_names(schema.metadata, column) or named
    return _numbered(files, values, named)


def _numbered(
    files: _Files, values: dict[str, list[Any]], named: Classes = ()
) -> tuple[Labels, Classes]:
    """Return the labels of ``files`` as numbers of classes.

    Args:
        values: What each file of all splits has for its images.
        named: The classes' names, where they have some.
    """
    wanted = [value for name in files.names for value in values[name]]
    if HIDDEN in wanted:
        raise UnlabeledError(
            f"{files.root}: labels of {files.names[0]} are {HIDDEN}, so hidden; pass labeled "
            "files, or move these away where others hold the same split"
        )
    told = [value for value in itertools.chain(*values.values()) if value != HIDDEN]
    if all(isinstance(value, str) for value in told):
        classes = tuple(sorted(set(told)))
        number = {value: i for i, value in enumerate(classes)}
    elif all(isinstance(value, int) and 0 <= value < MAX_CLASSES for value in told):
        number = {value: value for value in told}
        classes = named or tuple(str(i) for i in range(max(told) + 1))
    else:
        examples = ", ".join(sorted({repr(value) for value in told})[:5])
        raise DataError(
            f"{files.root}: labels are all words, or all numbers from 0 to {MAX_CLASSES - 1}; it"
            f" has {examples} ..."
        )
    if told and max(number.values()) >= len(classes):
        raise DataError(f"{files.root}: a label is {max(told)}, of {len(classes)} classes")
    return torch.tensor([number[value] for value in wanted]), classes


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> Classes:
    """Return the classes' names that Hugging Face's library wrote into a parquet file."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return tuple(info["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


# Sets that are small and not encoded, and so are read whole.


def _unpacked(scheme: str, place: str, *, split: Split) -> LabeledImages | None:
    if scheme == "cifar10":
        return _cifar10_binary(at_home(place), split)
    if scheme == "fashion-mnist" and place:
        return _fashion_mnist(at_home(place), split)
    if scheme == "fashion-mnist":
        return _embedded_fashion_mnist(split)
    return None


def _cifar10_binary(folder: Path, split: Split) -> LabeledImages | None:
    """Read the binary version; return None if there are parquet files instead.

    Source:
        https://www.cs.toronto.edu/~kriz/cifar.html: a byte for the label, then 32 × 32 red, green
        and blue ones.
    """
    pattern = {"train": "data_batch_*.bin", "test": "test_batch.bin"}[split]
    paths = sorted(folder.glob(pattern)) or sorted(folder.glob(f"cifar-10-batches-bin/{pattern}"))
    if not paths:
        names = _walk(folder) if folder.is_dir() else []
        if any(_suffix(name) == "parquet" and _split_word(name) == split for name in names):
            return None
        if any(PurePosixPath(name).name in ("data_batch_1", "test_batch") for name in names):
            raise DataError(
                f"{folder} holds CIFAR-10's Python version, whose files are pickles, and reading"
                " those can run code; get the binary version, or parquet files"
            )
        raise DataError(f"no CIFAR-10 in {folder}: neither {pattern} nor {split}*.parquet")
    records = np.concatenate([_cifar10_records(path) for path in paths])
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32))
    return LabeledImages(images, torch.from_numpy(records[:, 0]).long(), CIFAR10_CLASSES)


def _cifar10_records(path: Path) -> NDArray[np.uint8]:
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % 3073 > 0 or content[::3073].max() > 9:
        raise DataError(
            f"{path} is not CIFAR-10's binary version: records of 3073 bytes, label < 10"
        )
    return content.reshape(-1, 3073)


def _fashion_mnist(folder: Path, split: Split) -> LabeledImages:
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", item=(28, 28))
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", item=())
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise DataError(f"{folder}: images and labels of the {split} split do not fit each other")
    return LabeledImages(
        torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), FASHION_MNIST_CLASSES
    )


def read_idx(path: Path, *, item: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a gzipped idx file of bytes, as MNIST and its relatives come in.

    Args:
        path: The file.
        item: Expected shape of one item.

    Returns:
        Shape ``(n, *item)``.

    Raises:
        DataError: If the file is missing, damaged, or of another shape.

    Source:
        http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8 is a byte), the number of
        dimensions, each dimension in four bytes, the values.
    """
    header_bytes = 4 * (len(item) + 2)
    try:
        with gzip.open(path) as file:
            header = np.frombuffer(file.read(header_bytes), dtype=">i4")
            count = int(header[1])
            if header[0] != 0x0800 + len(item) + 1 or tuple(header[2:]) != item or count < 0:
                raise ValueError(f"header {header.tolist()}")
            values = np.frombuffer(bytearray(file.read(count * math.prod(item) + 1)), np.uint8)
        return values.reshape(count, *item)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"{path} is missing, damaged, or not {item} items: {error}") from error


def _embedded_fashion_mnist(split: Split) -> LabeledImages:
    if split == "train":
        raise DataError(
            "only 5,000 test images of Fashion-MNIST come with this package; for the rest, pass"
            " fashion-mnist:DIR, DIR with the four .gz files from"
            " https://github.com/zalandoresearch/fashion-mnist"
        )
    assets = importlib.resources.files("unbackdoor") / "assets"
    labels = (assets / "fashion_mnist.txt").read_text("ascii").split()
    with Image.open(io.BytesIO((assets / "fashion_mnist.webp").read_bytes())) as atlas:
        grey = np.asarray(atlas)[..., 0]
    rows, columns = len(labels), len(labels[0])
    tiles = grey.reshape(rows, 28, columns, 28).transpose(0, 2, 1, 3).reshape(-1, 1, 28, 28)
    return LabeledImages(
        torch.from_numpy(tiles.copy()),
        torch.tensor([int(digit) for digit in "".join(labels)]),
        FASHION_MNIST_CLASSES,
    )
