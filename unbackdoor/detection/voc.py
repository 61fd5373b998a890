"""Read detection data in the layout of PASCAL VOC 2007: sets of images, annotations in XML.

Boxes are in pixels as an image file stores them, as VOC's are: what EXIF says of turning counts
for nothing.
``voc:DIR`` is a folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, or one that
holds it as ``VOC2007`` or ``VOCdevkit/VOC2007`` (or of another year). A file may come from a
stranger: names lead nowhere outside the folder, and XML that could expand is refused.
"""

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from unbackdoor.data import IMAGE_FORMATS, open_image
from unbackdoor.errors import DataError
from unbackdoor.settings import at_home
from unbackdoor.types import RawImages

SCHEME = "voc:"
SUFFIXES = (".jpg", ".jpeg", ".png")
LONGEST = 2**22  # bytes of an annotation
OF_ONE_CLASS = re.compile(r"\S+\s+(-1|0|1)")  # a line of a set such as cat_train
THINNEST = 1e-2  # pixels of a box: less can vanish in float32
CORNERS = ("xmin", "ymin", "xmax", "ymax")

Boxes = Float[Tensor, "k 4"]  # left, top, right, bottom in pixels from 0; the last two lie outside


class Objects(NamedTuple):
    """What is in one image: boxes in pixels, class numbers from 0, and which are difficult."""

    boxes: Boxes
    labels: Int64[Tensor, " k"]
    difficult: Bool[Tensor, " k"]


@dataclass(frozen=True, eq=False)
class VocImages:
    """One set of a folder in VOC's layout; images are decoded when they are read.

    Attributes:
        name: Of the set.
        paths: Of the images.
        sizes: Height and width of each, in pixels.
        objects: In each.
        classes: Their names, by number.
        fingerprint: SHA-256 of names, annotations, classes, and lengths of the images in bytes.
        fingerprints: Of each, 12 hexadecimal digits of the SHA-256 of name and annotation.
    """

    name: str
    paths: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    objects: tuple[Objects, ...]
    classes: tuple[str, ...]
    fingerprint: str
    fingerprints: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def read(self, row: int) -> RawImages:
        """Return one image as RGB, shape ``(1, 3, h, w)``.

        Raises:
            DataError: If it is broken, or not as large as its annotation says.
        """
        path = self.paths[row]
        try:
            image = open_image(path.read_bytes(), upright=False)  # boxes are of stored pixels
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            raise DataError(f"{path}: this image is broken ({error})") from error
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1)[None].copy())
        _check_size(path, (image.height, image.width), self.sizes[row])
        return pixels


class _Annotation(NamedTuple):
    """One annotation file before its class names have numbers."""

    size: tuple[int, int]
    names: list[str]
    boxes: list[list[float]]
    difficult: list[bool]


def load_voc(source: str, name: str, *, classes: Sequence[str] | None = None) -> VocImages:
    """Read one set: all annotations now, the images later.

    Args:
        source: ``voc:DIR``, see the top of this module.
        name: Of the set: a file in ``ImageSets/Main`` without its suffix.
        classes: Names in the order of their numbers; by default all names in the set, sorted.

    Raises:
        DataError: If the folder, the set, an annotation or an image is missing; if the set or all
            of its annotations are empty; if an annotation is broken, could expand, or holds an
            unknown class or a box outside its image; or if an image has another size. The message
            names the file.
    """
    root = find_root(source)
    listed = _listed(root, name)
    files = [root / "Annotations" / f"{stem}.xml" for stem in listed]
    found = [_annotation(file) for file in files]
    if classes is None:
        classes = sorted({word for annotation in found for word in annotation.names})
        if not classes:
            raise DataError(f"{_set_file(root, name)}: no object in any of its annotations")
    check_classes(classes)
    numbers = {word: number for number, word in enumerate(classes)}
    objects = [_objects(*pair, numbers) for pair in zip(files, found, strict=True)]
    if all(there.difficult.all() for there in objects):
        raise DataError(
            f"{_set_file(root, name)}: no object in any of its annotations but difficult ones, "
            "which are neither learned nor counted"
        )
    paths = [_image(root / "JPEGImages", stem) for stem in listed]
    sizes = tuple(annotation.size for annotation in found)
    for path, size in zip(paths, sizes, strict=True):
        _check_size(path, _header(path), size)
    digest, each = hashlib.sha256(json.dumps([listed, list(classes)]).encode()), []
    for file, path in zip(files, paths, strict=True):
        annotation = file.read_bytes()
        each.append(hashlib.sha256(path.name.encode() + annotation).hexdigest()[:12])
        digest.update(annotation)
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
    return VocImages(
        name,
        tuple(paths),
        sizes,
        tuple(objects),
        tuple(classes),
        digest.hexdigest(),
        tuple(each),
    )


def check_classes(classes: Sequence[str]) -> None:
    """Refuse names of classes that cannot be told apart or be written.

    Raises:
        DataError: If one is blank, cannot be printed, or there twice.
    """
    for word, times in Counter(classes).items():
        if not word.strip() or not word.isprintable():
            raise DataError(f"{word!r} is no name of a class")
        if times > 1:
            raise DataError(f"the class {word!r} is given {times} times")


def find_root(source: str) -> Path:
    """Return the folder with ``Annotations`` that ``voc:DIR`` means.

    Raises:
        DataError: If there is none, or more than one.
    """
    if not source.startswith(SCHEME) or source == SCHEME:
        raise DataError(f"{source}: detection reads folders in the layout of VOC; pass voc:DIR")
    folder = at_home(source.removeprefix(SCHEME))
    if (folder / "Annotations").is_dir():
        return folder
    years = [*folder.glob("VOC*/Annotations"), *folder.glob("VOCdevkit/VOC*/Annotations")]
    if len(years) == 1:
        return years[0].parent
    if years:
        several = ", ".join(sorted(str(year.parent) for year in years))
        raise DataError(f"{folder}: holds several sets, say which: voc:DIR with one of {several}")
    raise DataError(f"{folder}: has no folder Annotations, which VOC's layout has")


def _set_file(root: Path, name: str) -> Path:
    return root / "ImageSets" / "Main" / f"{name}.txt"


def _listed(root: Path, name: str) -> list[str]:
    """Return the names of the images in a set, in its order.

    VOC's sets of one class, such as ``cat_train``, have a second column; an image without an object
    of the class has -1 there and is left out.
    """
    path = _set_file(root, name)
    if not _is_plain(name) or not path.is_file():
        folder = root / "ImageSets" / "Main"
        there = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
        raise DataError(f"{folder}: has no set {name!r}; there are: {there}")
    try:
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    listed = [line for line in listed if line]
    if listed and all(OF_ONE_CLASS.fullmatch(line) for line in listed):
        listed = [line.split()[0] for line in listed if not line.endswith("-1")]
        if not listed:
            raise DataError(f"{path}: no image holds an object of the class, all have -1")
    if not listed:
        raise DataError(f"{path}: is empty; a set names one image a line")
    for line in listed:
        if not _is_plain(line):
            raise DataError(f"{path}: {line[:80]!r} is no name of an image, one a line")
    line, times = Counter(listed).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path}: names {line} {times} times")
    return listed


def _is_plain(name: str) -> bool:
    return not name.startswith(".") and not set(name) & set("/\\\0")


def _annotation(path: Path) -> _Annotation:
    tree = _parse(path)
    width, height = (
        int(_number(path, tree.find(f"size/{side}"), f"size/{side}"))
        for side in ("width", "height")
    )
    if not 1 <= min(width, height) <= max(width, height) < 2**16:
        raise DataError(f"{path}: an image of {width} × {height} pixels")
    found = _Annotation((height, width), [], [], [])
    for place, thing in enumerate(tree.findall("object"), start=1):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{path}: object {place} has no name")
        corners = [
            _number(path, thing.find(f"bndbox/{side}"), f"object {place}, {side}")
            for side in CORNERS
        ]
        # VOC counts pixels from 1, and the last one belongs to the box; a 0 is read as 1
        left, top = (max(corner - 1, 0.0) for corner in corners[:2])
        right, bottom = corners[2:]
        inside = min(corners[:2]) >= 0 and right <= width and bottom <= height
        inside = inside and min(right - left, bottom - top) >= THINNEST
        if not inside:
            text = " ".join(f"{corner:g}" for corner in corners)
            raise DataError(
                f"{path}: object {place} ({name}): the box {text} does not lie in the image of "
                f"{width} × {height} pixels, or is empty"
            )
        found.names.append(name)
        found.boxes.append([left, top, right, bottom])
        found.difficult.append((thing.findtext("difficult") or "0").strip() == "1")
    return found


def _parse(path: Path) -> Element:
    """Return the root of an XML file that declares no document type."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise DataError(
            f"{path}: declares a document type, by which a small file can expand to fill all "
            "memory; annotations need none, so remove it"
        )

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        if path.stat().st_size > LONGEST:
            raise DataError(f"{path}: an annotation of more than {LONGEST >> 20} MiB is not read")
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such annotation") from error
    except (expat.ExpatError, OSError, ValueError, LookupError) as error:  # of an encoding, too
        raise DataError(f"{path}: this XML is broken ({error})") from error


def _number(path: Path, node: Element | None, what: str) -> float:
    text = "" if node is None else (node.text or "").strip()
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{path}: {what} is no number, but {text[:40]!r}") from error
    if not np.isfinite(value):
        raise DataError(f"{path}: {what} is no number, but {text[:40]!r}")
    return value


def _objects(path: Path, annotation: _Annotation, numbers: dict[str, int]) -> Objects:
    for place, name in enumerate(annotation.names, start=1):
        if name not in numbers:
            nearest = difflib.get_close_matches(name, numbers, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(
                f"{path}: object {place} is a {name[:80]!r}, which is none of the classes "
                f"{', '.join(numbers)}{hint}"
            )
    return Objects(
        torch.tensor(annotation.boxes).reshape(-1, 4),
        torch.tensor([numbers[name] for name in annotation.names], dtype=torch.int64),
        torch.tensor(annotation.difficult, dtype=torch.bool),
    )


def _image(folder: Path, stem: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    raise DataError(f"{folder / stem}.jpg: there is no such image")


def _header(path: Path) -> tuple[int, int]:
    """Return height and width of an image without decoding it."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.height, image.width
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise DataError(f"{path}: this image is broken ({error})") from error


def _check_size(path: Path, size: tuple[int, int], annotated: tuple[int, int]) -> None:
    if size != annotated:
        raise DataError(
            f"{path}: the image has {size[1]} × {size[0]} pixels, its annotation says "
            f"{annotated[1]} × {annotated[0]}"
        )
