"""Read tensors from files that may come from an attacker, and write tensors; never run code.

A pickle is not unpickled here. Its opcodes are followed one by one, and whatever it names, calls or
builds becomes an inert stand-in that only remembers what the file says about it: nothing is looked
up, imported or called, whatever the file is. Tensors are then cut from the mapped file, after their
sizes were checked against the bytes that are there.

Why not ``torch.load(weights_only=True)`` with stubs in ``safe_globals``, measured on torch 2.15: it
refuses whole modules in legacy files, dictionaries and lists of a class of their own, and pickle
protocols 3 to 5; it reads compressed records as garbage when mapping; it allocates what a legacy
file asks for before it looks at the file's size. The tests use it as an oracle where it works.
"""

import hashlib
import io
import json
import logging
import math
import mmap
import os
import pickletools
import secrets
import struct
import tempfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias, Union, cast

import safetensors.torch
import torch
from picklescan.scanner import (  # type: ignore[import-untyped]  # it ships no types
    SafetyLevel,
    scan_pickle_bytes,
)
from torch import Tensor

from unbackdoor.errors import CheckpointError, OutputError, UnsafeCheckpointError, printable

# Nested as in the file, tensors only at the end. beartype cannot resolve a union within quotes.
Tree: TypeAlias = dict[str, Union["Tree", Tensor]]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".th", ".tar")  # MoCo's end in .pth.tar
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch < 1.6 wrote
OTHER_FORMATS = {  # first bytes: what the file is, and what to do
    b"version https://git-lfs": "only a pointer to the file, by Git LFS; get the file itself by git"
    " lfs pull",
    b"<": "a page of HTML or XML, as a site sends where it has no file; get the file itself",
    b"{": "text in JSON; pass the file of tensors beside it",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"7z\xbc\xaf": "compressed by 7-Zip; unpack it",
    b"Rar!": "compressed by RAR; unpack it",
    b"\x89HDF": "HDF5, as Keras writes it; pass the weights as PyTorch has them",
    b"GGUF": "GGUF, which is quantized; pass the weights that it was made from",
    b"\x93NUMPY": "an array of NumPy; pass the weights as torch.save or safetensors writes them",
}
FIRST_BYTES = max(map(len, OTHER_FORMATS))
ALIGNMENT = 16  # bytes; tensors that start elsewhere are copied out of the mapped file
MOST_VISITS = 1_000  # of one container while walking a file; only bombs need more
MOST_PARTS = 300_000  # of a file, each counted as often as it is referred to
MOST_OPCODES = 5_000_000  # of a pickle; a stand-in takes up to half a kilobyte
MOST_LETTERS = 2_000  # of a part's name with the names of all that it lies in
MOST_STATES = 4  # of an object; pickle gives it one
MOST_AXES = 64  # of a tensor, as in PyTorch
MOST_COPIES = 64  # of a file's bytes, in all its tensors together: layers may share theirs
HARMLESS = 2**30  # bytes that they may claim in any file

# Trainers' state: it belongs to the old weights, although it holds tensors.
TRAINER_WORDS = ("optim", "scheduler", "scaler")
TRAINER_KEYS = ("callbacks", "loops", "amp", "rng_state", "rng_states")

# Beside picklescan's list, which calls these "suspicious" as it does every harmless class.
RUNS_CODE = (
    *("io.open", "io.open_code", "io.FileIO", "_io.open", "_io.open_code"),
    *("importlib", "_frozen_importlib", "_frozen_importlib_external", "imp", "zipimport"),
    *("builtins.__import__", "builtins.globals", "builtins.locals", "builtins.vars"),
    *("builtins.setattr", "builtins.delattr", "builtins.input"),
    *("builtins.execfile", "builtins.file"),  # Python 2's
    *("torch.load", "torch.hub", "torch.jit", "torch.package", "torch.utils.cpp_extension"),
    *("torch.storage._load_from_bytes", "torch.multiprocessing", "multiprocessing"),
    *("code.interact", "code.InteractiveInterpreter", "code.InteractiveConsole", "codeop"),
    *("marshal", "types.FunctionType", "dill", "joblib", "cloudpickle"),
    *("numpy.load", "numpy.save", "pandas.eval", "pandas.read_pickle", "pandas.io.pickle"),
    *("http", "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "platform.popen"),
    *("tempfile", "fileinput", "pkgutil", "sqlite3", "shelve", "zipfile", "threading", "atexit"),
    *("torch.fx.graph_module", "torch.ops", "torch.classes", "torch.testing", "distutils", "yaml"),
    *("_ctypes", "cffi", "sympy", "numexpr", "PIL.ImageMath"),
    *(
        f"pathlib.{kind}.{does}"
        for kind in ("Path", "PosixPath", "WindowsPath")
        for does in ("write_text", "write_bytes", "open", "unlink", "rename", "replace", "touch")
    ),
)  # fmt: skip

MOST_STEPS = 8  # of a name with dots: what a class in a class in a class has, and more

TAKES_MARK = (  # opcodes that take everything above the last mark
    *("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS"),
    *("INST", "OBJ", "POP_MARK"),
)

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}

logging.getLogger("picklescan").addHandler(logging.NullHandler())  # its findings are in our errors


class Stamp(NamedTuple):
    """What a file was like when it was read."""

    path: Path
    size: int
    changed: int  # nanoseconds


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one file or folder, nested as they were.

    Attributes:
        path: The file or folder.
        kind: Its format, known by its content; torch covers zip and legacy files.
        tree: Dictionaries by string keys, with CPU tensors as leaves. They may be views of the
            mapped file, changed only in memory. Lists and tuples appear as dictionaries by
            position, whole modules as their state dict.
        dropped: What is not in ``tree``, each with its type, ``epoch (int)``.
        sha256: Of the file. Of a folder: of names and hashes of the files read, in sorted order.
        config: The ``config.json`` of a Hugging Face folder, else empty.
        stamps: Of the files read: path, length and time of the last change.
    """

    path: Path
    kind: Literal["safetensors", "torch", "huggingface"]
    tree: Tree
    dropped: tuple[str, ...]
    sha256: str
    config: Mapping[str, Any]
    stamps: tuple[Stamp, ...] = ()


class _Content(NamedTuple):
    kind: Literal["safetensors", "torch"]
    tree: Tree
    dropped: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the tensors of ``path``, and nothing but tensors.

    Args:
        path: A safetensors file, a file of ``torch.save`` (zip or legacy), or a Hugging Face folder
            with one file or shards of either.

    Raises:
        UnsafeCheckpointError: If the file names something that could run code.
        CheckpointError: If there is no such file, or it is damaged, of another format, a
            TorchScript archive, or holds no named tensors, or quantized or sparse ones.
    """
    if path.is_dir():
        return _read_folder(path)
    stamps = (_stamp(path),)
    kind, tree, dropped = _read_file(path)
    return Checkpoint(path, kind, tree, dropped, sha256_of(path), {}, stamps)


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse to go on with tensors that are views of files which have changed since.

    Raises:
        CheckpointError: If one has.
    """
    for stamp in checkpoint.stamps:
        if _stamp(stamp.path) != stamp:
            raise CheckpointError(
                f"{stamp.path}: was changed while it was in use; put back what it was and pass "
                "--resume, or start again"
            )


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:  # whoever reads it says more
        return Stamp(path, 0, 0)
    return Stamp(path, status.st_size, status.st_mtime_ns)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tree: Tree, *, metadata: Mapping[str, str], overwrite: bool) -> None:
    """Write tensors; ``path`` holds either all of them or what it held before.

    Args:
        path: Its suffix decides: ``.safetensors``, or one of ``TORCH_SUFFIXES`` for a plain
            ``torch.save`` file of tensors.
        tree: Nested as it shall be in the file; for safetensors it must be flat.
        metadata: For the safetensors header; torch files have no place for it.
        overwrite: Whether a file at ``path`` may be replaced.

    Raises:
        OutputError: If the suffix is another one, the tree is nested but must not be, the file
            exists, or it cannot be written.
    """
    if path.suffix == ".safetensors":
        if nested := [key for key, value in tree.items() if isinstance(value, dict)]:
            raise OutputError(
                f"{path}: safetensors holds flat tensors only, and {nested[0]!r} is a dictionary; "
                "pass a .pt file to keep the nesting"
            )
        flat = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
        with _replacing(path, overwrite=overwrite) as temporary:
            safetensors.torch.save_file(_unshared(flat), temporary, dict(metadata))
            _sort_metadata(temporary)
    elif path.suffix in TORCH_SUFFIXES:
        with _replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
            torch.save(_compact(tree), file)
    else:
        raise OutputError(
            f"{path}: unknown kind of output {path.suffix!r}; "
            f"use .safetensors, or one of {', '.join(TORCH_SUFFIXES)}"
        )


def check_output(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a path that nothing can be written to, before anything is computed for it.

    Args:
        inputs: What the command reads, files or folders.

    Raises:
        OutputError: If the file exists and must not be replaced, is one of ``inputs`` or lies in
            one, or is a folder; and as :func:`check_folder`.
    """
    refuse_inputs(path, inputs)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; pass a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; pass --force to replace it")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Refuse a file that would lie in no folder, or in one in which nothing can be written.

    Raises:
        OutputError: In these two cases.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: nothing can be written in {path.parent} ({error.strerror}); pass another"
        ) from error


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a safetensors file cannot hold, by their names and dtypes alone.

    Raises:
        OutputError: If one of them could not be written to ``path``, or not be read again.
    """
    for key, tensor in tensors.items():
        empty = {key: torch.empty(0, dtype=tensor.dtype)}
        try:
            safetensors.torch.load(safetensors.torch.save(empty))
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise OutputError(
                f"{path}: safetensors cannot hold {printable(key)!r} of {tensor.dtype}; "
                "pass a .pt file"
            ) from error


def refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write to what is being read, whatever shall be overwritten.

    Raises:
        OutputError: If ``path`` is one of ``inputs``, or lies in one that is a folder.
    """
    place = path.resolve()
    for given in inputs:
        if given.resolve() in (place, *place.parents):
            raise OutputError(
                f"{path}: would change the input {given}, which never happens; pass another file"
            )


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write ``text`` as UTF-8; ``path`` holds either all of it or what it held before.

    Raises:
        OutputError: If the file exists and must not be replaced, or cannot be written.
    """
    with _replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path beside ``path`` that takes its place if all goes well, else vanishes."""
    check_output(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves its files readable to their owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {_first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which the library writes as it comes.

    So the same tensors and metadata make the same bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) <= length:  # always, but for what the library may write otherwise some day
                file.seek(8)
                file.write(text.ljust(length))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    result: dict[str, Tensor] = {}
    used: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in used:
            plain = plain.clone()
        used.add(plain.untyped_storage().data_ptr())
        result[key] = plain
    return result


def _compact(tree: Tree) -> Tree:
    """Return ``tree`` with CPU tensors that bring no more than their own bytes along."""

    def compact(tensor: Tensor) -> Tensor:
        plain = tensor.detach().cpu()
        return plain.clone() if plain.untyped_storage().nbytes() > plain.nbytes else plain

    return {
        key: _compact(value) if isinstance(value, dict) else compact(value)
        for key, value in tree.items()
    }


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__)[:200])


def _read_file(path: Path) -> _Content:
    """Read one file, whose format is told by its first bytes."""
    try:
        size = path.stat().st_size
        start = b""
        if size > 0:
            with path.open("rb") as file:
                start = file.read(FIRST_BYTES)
    except OSError as error:
        nothing = "; nothing is downloaded" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{nothing}") from error
    try:
        if start[8:9] == b"{":
            return _Content("safetensors", _read_safetensors(path), ())
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path, size)
        if start.startswith(b"\x80"):
            return _read_legacy(path, size)
    except (CheckpointError, UnsafeCheckpointError):
        raise
    except Exception as error:  # a hostile or damaged file can make any line below fail
        raise CheckpointError(f"{path}: damaged or cut short ({_first_line(error)})") from error
    what = "neither a safetensors file nor one that torch.save wrote" if start else "is empty"
    for first, other in OTHER_FORMATS.items():
        if start.lstrip().startswith(first):
            what = other
    raise CheckpointError(f"{path}: {what}")


def _read_safetensors(path: Path) -> Tree:
    """Read a safetensors file; the library checks every size before it allocates."""
    tree: Tree = dict(safetensors.torch.load_file(path))
    if not tree:
        raise CheckpointError(f"{path}: holds no tensors")
    if len(longest := max(tree, key=len)) > MOST_LETTERS:
        raise CheckpointError(
            f"{path}: has a tensor whose name is longer than {MOST_LETTERS:,} letters, as no "
            f"checkpoint has: {printable(longest[:60])!r}"
        )
    return tree


def _read_folder(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder, safetensors before pickles."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            used, shards = [folder / name], {name: set[str]()}
        elif index.is_file():
            shards = _read_index(index)
            used = [index, *(folder / shard for shard in shards)]
        else:
            continue
        break
    else:
        raise CheckpointError(
            f"{folder}: holds no model.safetensors or pytorch_model.bin, nor an index of shards"
        )

    config = folder / "config.json"
    if config.is_file():
        used.append(config)
    stamps = tuple(map(_stamp, used))
    tree: Tree = {}
    dropped: list[str] = []
    for shard, keys in shards.items():
        content = _read_file(folder / shard)
        if absent := keys - content.tree.keys():
            raise CheckpointError(
                f"{folder / shard}: lacks {min(absent)!r}, which the index promises"
            )
        tree |= content.tree
        dropped += content.dropped

    hashes = "".join(f"{file.name} {sha256_of(file)}\n" for file in sorted(used))
    return Checkpoint(
        folder,
        "huggingface",
        tree,
        tuple(dropped),
        hashlib.sha256(hashes.encode()).hexdigest(),
        _read_json(config) if config.is_file() else {},
        stamps,
    )


def _read_index(path: Path) -> dict[str, set[str]]:
    """Return the shards an index names, each with its keys."""
    entries = _read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path}: has no weight_map")
    shards: dict[str, set[str]] = {}
    for key, name in entries.items():
        # Plain names only, and unresolved: Hugging Face's cache links its files to elsewhere.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: names {name!r}, which is not a file of this folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: names {name!r}, which is missing")
        shards.setdefault(name, set()).add(key)
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _read_zip(path: Path, size: int) -> _Content:
    """Read what ``torch.save`` writes since 1.6: a zip of one pickle and a record per storage."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: info for info in archive.infolist()}
    if any(name.endswith("/constants.pkl") for name in records):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which is a program and not a set of tensors; "
            "save module.state_dict() as .safetensors instead"
        )
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    for name, info in records.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: {printable(name)} is compressed, which torch.save never does"
            )
    if sum(info.file_size for info in records.values()) > size:
        raise CheckpointError(f"{path}: its records claim more than the file's {size} bytes")

    with path.open("rb") as file:
        spans = {name: _record_span(file, info, size) for name, info in records.items()}

        def record(name: str) -> bytes:
            file.seek(spans[folder + name].start)
            return file.read(len(spans[folder + name]))

        if folder + "byteorder" in records and record("byteorder") != b"little":
            raise CheckpointError(f"{path}: was written on a big-endian machine; not supported")
        (content,), _ = _follow_all(path, io.BytesIO(record("data.pkl")), pickles=1)

    data = folder + "data/"
    storages = {name.removeprefix(data): spans[name] for name in spans if name.startswith(data)}
    return _harvest(path, size, content, storages)


def _record_span(file: IO[bytes], info: zipfile.ZipInfo, size: int) -> range:
    """Return where an uncompressed record's bytes lie in the file."""
    file.seek(info.header_offset)
    name_and_extra = struct.unpack("<26x2H", file.read(30))
    start = info.header_offset + 30 + sum(name_and_extra)
    if start + info.file_size > size:
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    return range(start, start + info.file_size)


def _read_legacy(path: Path, size: int) -> _Content:
    """Read what ``torch.save`` wrote before 1.6: five pickles, then the storages one by one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        (magic,), _ = _follow_all(path, stream, pickles=1)
        if magic != LEGACY_MAGIC:
            raise CheckpointError(f"{path}: a pickle, but not one that torch.save wrote")
        (_, system, content, keys), declared = _follow_all(path, stream, pickles=4)
        if ("little_endian", True) not in system.pairs:
            raise CheckpointError(f"{path}: was written on a big-endian machine; not supported")
        storages: dict[str, range] = {}
        for key in keys:
            if not isinstance(key, str):
                raise ValueError("a storage's key is no string")
            numel = int.from_bytes(stream.read(8), "little", signed=True)
            start = stream.tell()
            storages[key] = range(start, start + numel * declared[key].itemsize)
            if not start <= storages[key].stop <= size:
                raise CheckpointError(f"{path}: damaged or cut short (storage {key})")
            stream.seek(storages[key].stop)
    return _harvest(path, size, content, storages)


@dataclass(frozen=True)
class _Name:
    """Something the file names by module and name; never looked up."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Storage:
    """A run of bytes the file says it has."""

    key: str
    kind: str
    numel: int

    @property
    def itemsize(self) -> int:
        return STORAGE_DTYPES[self.kind].itemsize


@dataclass(frozen=True)
class _View:
    """A tensor the file says it has."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Object:
    """Stands in for an object of the file, which is never made."""

    kind: str
    states: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)  # not a dict: keys may not hash
    items: list[Any] = field(default_factory=list)


class _Followed(NamedTuple):
    values: list[Any]
    storages: dict[str, _Storage]


def _follow_all(path: Path, stream: io.BytesIO | mmap.mmap, *, pickles: int) -> _Followed:
    """Follow pickles one after the other, and refuse the file if any names something dangerous."""
    names: set[_Name] = set()
    storages: dict[str, _Storage] = {}
    try:
        return _Followed([_follow(stream, names, storages) for _ in range(pickles)], storages)
    finally:  # a file that breaks off after the name is no less dangerous
        if dangerous := _dangerous(names):
            raise UnsafeCheckpointError(
                f"{path}: not loaded, because it names {printable(', '.join(dangerous))}, "
                "which could run code on loading. Ask its author for a .safetensors file; if it is "
                "your own, load it where you made it and save its state dict as one."
            )


def _dangerous(names: Iterable[_Name]) -> list[str]:
    """Return the names that could run code, by picklescan's verdict and by our own list."""

    def text(word: str) -> bytes:
        data = word.encode("utf-8", "surrogatepass")
        return b"X" + len(data).to_bytes(4, "little") + data

    def readings(name: _Name) -> set[tuple[str, str]]:
        # A name with dots leads from a module to what it imports: "serialization.os.system" of
        # "torch" is os.system as well.
        steps = name.name.split(".")
        if len(steps) > MOST_STEPS:
            raise ValueError(f"a name of {len(steps)} parts in the pickle")
        outer, _, inner = name.path.rpartition(".")
        ends = range(len(steps) + 1)
        parts = {
            (".".join(steps[i:j]), ".".join(steps[j:]))
            for i in ends
            for j in ends
            if i < j < ends[-1]
        }
        return {(name.module, name.name), (outer, inner)} | parts

    # picklescan judges pickles, so it is given one that names just these.
    pairs = {pair for name in names for pair in readings(name)}
    pickled = b"".join(text(module) + text(name) + b"\x93" for module, name in pairs)
    verdict = scan_pickle_bytes(io.BytesIO(b"\x80\x04" + pickled + b"."), "names")
    if len(verdict.globals) != len(pairs):
        raise ValueError("picklescan cannot judge the names in the pickle")
    refused = {(g.module, g.name) for g in verdict.globals if g.safety is SafetyLevel.Dangerous}

    def runs_code(name: _Name) -> bool:
        dotted = {f"{module}.{inner}." for module, inner in readings(name)}
        return not refused.isdisjoint(readings(name)) or any(
            path.startswith(f"{entry}.") for path in dotted for entry in RUNS_CODE
        )

    return sorted(name.path for name in names if runs_code(name))


def _follow(
    stream: io.BytesIO | mmap.mmap, names: set[_Name], storages: dict[str, _Storage]
) -> Any:
    """Follow one pickle's opcodes with stand-ins, and return what it would have made.

    Args:
        stream: Left behind the pickle's end. Not a file, which would set memory aside for a
            string of any length before it sees how much there is.
        names: Takes every global the pickle names.
        storages: Takes every storage it declares, by key.

    Raises:
        Exception: Of any kind, if the pickle is damaged.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def named(module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is no string")
        if len(module) + len(name) > MOST_LETTERS:
            raise ValueError(f"a name of {len(module) + len(name):,} letters in the pickle")
        # As pickle does: protocols 0 to 2 name what Python 2 called it.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        result = _Name(module, name)
        names.add(result)
        return result

    value: Any  # the opcode's own argument
    for count, (opcode, value, _) in enumerate(pickletools.genops(cast("IO[bytes]", stream))):
        if count == MOST_OPCODES:
            raise ValueError(f"a pickle of more than {MOST_OPCODES:,} opcodes")
        items: list[Any] = []
        if opcode.name in TAKES_MARK:
            items, stack = stack, marks.pop()
        match opcode.name:
            case "PROTO" | "FRAME" | "POP_MARK":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE" | "TUPLE":
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "EMPTY_LIST" | "LIST":
                stack.append(items)
            case "EMPTY_SET" | "FROZENSET":
                stack.append(_Object("set", items=items))
            case "EMPTY_DICT" | "DICT":
                stack.append(_Object("dict", pairs=_pairs(items)))
            case "APPEND":
                _add(stack[-2], [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _add(stack[-1], items)
            case "SETITEM":
                item = stack.pop()
                key = stack.pop()
                stack[-1].pairs.append((key, item))
            case "SETITEMS":
                stack[-1].pairs.extend(_pairs(items))
            case "GLOBAL":
                stack.append(named(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(named(stack.pop(), name))
            case "INST":
                stack.append(_call(named(*value.split(" ", 1)), tuple(items)))
            case "OBJ":
                stack.append(_call(items[0], tuple(items[1:])))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                stack.pop()
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Object):
                    if len(stack[-1].states) == MOST_STATES:
                        raise ValueError("an object is given its state again and again")
                    stack[-1].states.append(state)
            case "BINPERSID":
                stack.append(_persistent(stack.pop(), storages))
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"{opcode.name} is nothing that torch.save writes")
            case _:  # all others are constants: numbers, strings, bytes
                stack.append(value)
    raise ValueError("the pickle has no end")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _add(target: Any, items: list[Any]) -> None:
    (target if isinstance(target, list) else target.items).extend(items)


def _persistent(identity: Any, storages: dict[str, _Storage]) -> _Storage | _Name:
    """Return what torch files keep outside the pickle: a storage; in legacy files also a class."""
    if identity[0] == "module" and isinstance(identity[1], _Name):
        return identity[1]
    word, kind, key, _, numel, *views = identity
    if word != "storage" or not isinstance(key, str) or type(numel) is not int or any(views):
        raise ValueError("a storage is declared in an unknown way")
    storages[key] = _Storage(key, kind.name, numel)
    return storages[key]


def _call(function: Any, arguments: Any) -> Any:
    """Return a view where the file calls one of torch's rebuild functions, else a stand-in."""
    path = function.path if isinstance(function, _Name) else "unknown"
    match path.removeprefix("torch._utils."), arguments:
        case ("_rebuild_tensor", (storage, offset, shape, stride)) | (
            "_rebuild_tensor_v2",
            (storage, offset, shape, stride, _, _),
        ) if storage.kind in STORAGE_DTYPES:
            return _view(storage, STORAGE_DTYPES[storage.kind], offset, shape, stride)
        case "_rebuild_tensor_v3", (storage, offset, shape, stride, _, _, _Name() as name):
            dtype = vars(torch).get(name.name)  # not getattr, which imports some of torch's modules
            if isinstance(dtype, torch.dtype):
                return _view(storage, dtype, offset, shape, stride)
        case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (data, *_)):
            return data
        case "_rebuild_device_tensor_from_cpu_tensor", (data, *_):
            return data
        case "torch._tensor._rebuild_from_type_v2", (inner, _, inner_arguments, _):
            return _call(inner, inner_arguments)
        case "builtins.set" | "builtins.frozenset", (list() as entries,):
            return _Object("set", items=entries)
        case "collections.OrderedDict", (list() as entries,):  # as Python 2 wrote it
            pairs = [(key, value) for key, value in entries]
            entries.clear()  # written for this call alone; others would copy it again
            return _Object(path, pairs=pairs)
    return _Object(path)


def _view(storage: Any, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> _View:
    if not len(shape) == len(stride) <= MOST_AXES:
        raise ValueError(f"a tensor's shape and strides differ in length, or exceed {MOST_AXES}")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor's shape is not made of whole numbers of 64 bits")
    return _View(storage, dtype, offset, tuple(shape), tuple(stride))


def _harvest(path: Path, size: int, content: Any, storages: Mapping[str, range]) -> _Content:
    """Turn what a pickle would have made into tensors and a list of what was dropped."""
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    harvest = _Harvest(path, cast("torch.UntypedStorage", mapped), storages)
    tree = harvest.take(content, "")
    if not isinstance(tree, dict):
        what = "one tensor without a name" if isinstance(tree, Tensor) else "no tensors"
        if trainers := [printable(key) for key, _ in _children(content) if _is_trainer_state(key)]:
            what += f" outside of what a trainer keeps ({', '.join(trainers[:5])})"
        raise CheckpointError(f"{path}: holds {what}, but a state dict was expected")
    dropped = [f"the module around it ({_kind(content)})"] if _is_module(content) else []
    return _Content("torch", tree, (*dropped, *harvest.dropped))


@dataclass
class _Harvest:
    """A walk through stand-ins that collects tensors by name."""

    path: Path
    mapped: torch.UntypedStorage
    spans: Mapping[str, range]
    dropped: list[str] = field(default_factory=list)
    visits: Counter[int] = field(default_factory=Counter)
    parts: int = 0
    again: int = 0  # parts of what was met before
    claimed: int = 0  # bytes, by all tensors together
    cut: dict[str, torch.UntypedStorage] = field(default_factory=dict)

    def take(self, value: Any, name: str) -> Tree | Tensor | None:
        """Return the tensors in ``value``, or None (and note it) if there are none."""
        self.parts += 1
        if self.parts > MOST_PARTS or len(name) > MOST_LETTERS:
            raise CheckpointError(
                f"{self.path}: has more than {MOST_PARTS:,} parts, or one whose name is longer "
                f"than {MOST_LETTERS:,} letters, as no checkpoint has: {name[:60]!r}"
            )
        if isinstance(value, _View):
            return self.tensor(value, name)
        before = len(self.dropped)
        tree: Tree = {}
        self.enter(value, name)
        if _is_module(value):
            tree = self.module(value, "")
        else:
            for key, inner in _children(value):
                dotted = printable(f"{name}.{key}" if name else key)
                if _is_trainer_state(key) and not isinstance(inner, _View):
                    self.dropped.append(f"{dotted} ({_kind(inner)})")
                elif (taken := self.take(inner, dotted)) is not None:
                    tree[key] = taken
        if tree:
            return tree
        del self.dropped[before:]  # the whole says enough
        self.dropped.append(f"{name} ({_kind(value)})")
        return None

    def module(self, module: _Object, prefix: str) -> Tree:
        """Return a pickled module's state dict, in its order."""
        self.enter(module, prefix)
        state = _attributes(module)
        passing = state.get("_non_persistent_buffers_set")
        skipped: set[str] = set()
        if isinstance(passing, _Object):
            self.enter(passing, prefix)
            skipped = {key for key in passing.items if isinstance(key, str)}
        tree: Tree = {}
        for key, value in (*_children(state["_parameters"]), *_children(state.get("_buffers"))):
            if value is not None and key not in skipped:
                tensor = self.take(value, printable(prefix + key))
                if isinstance(tensor, Tensor):
                    tree[prefix + key] = tensor
        for key, value in _children(state["_modules"]):
            if _is_module(value):
                tree |= self.module(value, f"{prefix}{key}.")
        return tree

    def enter(self, value: Any, name: str) -> None:
        """Refuse loops, references that unfold without end, and tensors of unknown layout."""
        if held := _count_parts(value):
            self.visits[id(value)] += 1
            if self.visits[id(value)] > 1:  # what is there once is paid for by the file's bytes
                self.again += held
        if self.visits[id(value)] > MOST_VISITS or self.again > MOST_PARTS:
            raise CheckpointError(f"{self.path}: repeats one part of itself without end")
        if isinstance(value, _Object) and "._rebuild_" in value.kind:
            raise CheckpointError(
                f"{self.path}: {name} is no plain tensor ({_kind(value)}); quantized, sparse and "
                "other special tensors are not supported, save them as dense ones"
            )

    def tensor(self, view: _View, name: str) -> Tensor:
        """Cut one tensor from the mapped file, once its claims are checked."""
        span = self.spans.get(view.storage.key, range(0))
        claimed = view.storage.numel * view.storage.itemsize
        if claimed != len(span):
            raise CheckpointError(
                f"{self.path}: {name} claims a storage of {claimed} bytes, the file has {len(span)}"
            )
        numel, itemsize = math.prod(view.shape), view.dtype.itemsize
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
        if numel and (last + 1) * itemsize > claimed:
            raise CheckpointError(f"{self.path}: {name} {view.shape} reaches beyond its storage")
        if numel * itemsize > self.mapped.nbytes():
            raise CheckpointError(f"{self.path}: {name} {view.shape} is larger than the file")
        self.claimed += numel * itemsize
        if self.claimed > max(MOST_COPIES * self.mapped.nbytes(), HARMLESS):
            raise CheckpointError(
                f"{self.path}: its tensors claim more than {MOST_COPIES} times the file's bytes"
            )

        key = view.storage.key
        if key not in self.cut:
            piece = self.mapped[span.start : span.stop]
            self.cut[key] = piece.clone() if span.start % ALIGNMENT else piece
        empty = torch.empty(0, dtype=view.dtype)
        return empty.set_(self.cut[key], view.offset, view.shape, view.stride)


def _is_trainer_state(key: str) -> bool:
    return key in TRAINER_KEYS or any(word in key.lower() for word in TRAINER_WORDS)


def _is_module(value: Any) -> bool:
    return isinstance(value, _Object) and {"_parameters", "_modules"} <= _attributes(value).keys()


def _attributes(value: _Object) -> dict[str, Any]:
    """Return what an object's ``__dict__`` and slots would have held."""
    return {k: inner for part in _states(value) for k, inner in part.pairs if isinstance(k, str)}


def _states(value: _Object) -> list[_Object]:
    """Return the dictionaries that an object was given: its ``__dict__``, perhaps its slots."""
    pairs = [s if isinstance(s, tuple) and len(s) == 2 else (s,) for s in value.states]
    return [part for pair in pairs for part in pair if isinstance(part, _Object)]


def _count_parts(value: Any) -> int:
    """Return how many parts a container or object holds itself, whatever their names."""
    if isinstance(value, list | tuple):
        return len(value)
    if not isinstance(value, _Object):
        return 0
    return len(value.pairs) + len(value.items) + sum(len(part.pairs) for part in _states(value))


def _children(value: Any) -> list[tuple[str, Any]]:
    """Return the named parts of a container or object: none if its keys are not strings."""
    if isinstance(value, list | tuple):
        return [(str(place), inner) for place, inner in enumerate(value)]
    if not isinstance(value, _Object) or not all(isinstance(key, str) for key, _ in value.pairs):
        return []
    return value.pairs or [*_attributes(value).items()] or _children(value.items)


def _kind(value: Any) -> str:
    if isinstance(value, _Name):
        return printable(f"class {value.path}")
    return printable(value.kind) if isinstance(value, _Object) else type(value).__name__
