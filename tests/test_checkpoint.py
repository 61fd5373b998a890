import argparse
import collections
import gzip
import hashlib
import importlib
import json
import pathlib
import pickle
import random
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from unbackdoor import checkpoint
from unbackdoor.checkpoint import (
    check_folder,
    check_tensors,
    check_unchanged,
    read_checkpoint,
    sha256_of,
    write_tensors,
    write_text,
)
from unbackdoor.errors import CheckpointError, OutputError, UnbackdoorError, UnsafeCheckpointError

torch.set_num_threads(1)

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def same(found, expected) -> bool:
    return list(found) == list(expected) and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
        for key in expected
    )


def save(value, path: Path, *, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def save_pickle(pickled: bytes, path: Path, *, zipped: bool) -> Path:
    """Wrap a pickle as ``torch.save`` does, without storages."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    else:
        system = {"protocol_version": 1001, "little_endian": True}
        heads = (pickle.dumps(head, 2) for head in (0x1950A86A20F9469CFC6C, 1001, system))
        path.write_bytes(b"".join(heads) + pickled + pickle.dumps([], 2))
    return path


def rewrite(path: Path, change, *, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the zip again with its pickle changed."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


class Calls:
    """Calls ``function`` when unpickled, as a malicious checkpoint would."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def attacks(canary: Path, folder: Path) -> dict[str, tuple[Calls, str]]:
    import os
    import runpy

    script = folder / "script.py"
    script.write_text(f"open({str(canary)!r}, 'w').close()\ndef entry(): pass\n")
    (folder / "hubconf.py").write_text(script.read_text())
    write = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, f"touch {canary}"), "posix.system"),
        "Popen": (Calls(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "eval": (Calls(eval, write), "eval"),
        "exec": (Calls(exec, write), "exec"),
        "open": (Calls(open, str(canary), "w"), "io.open"),
        "hub": (Calls(torch.hub._load_local, str(folder), "entry"), "torch.hub._load_local"),
        "runpy": (Calls(runpy.run_path, str(script)), "runpy.run_path"),
        "nested": (
            Calls(collections.OrderedDict, [("w", Calls(os.system, f"touch {canary}"))]),
            "posix.system",
        ),
    }


@BOTH_FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "attack", ["os.system", "Popen", "eval", "exec", "open", "hub", "runpy", "nested"]
)
def test_evil_files_are_refused_by_name_and_never_run(tmp_path, attack, protocol, zipped):
    canary = tmp_path / "canary"
    evil, name = attacks(canary, tmp_path)[attack]
    content = {"state_dict": network().state_dict(), "extra": evil}
    path = save(content, tmp_path / "victim.pt", zipped=zipped, protocol=protocol)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: not loaded, because it names ")
    assert name in str(caught.value)
    assert "Ask its author for a .safetensors file; if it is your own" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("attack", ["os.system", "Popen", "eval", "exec", "open", "hub", "runpy"])
def test_the_evil_files_of_these_tests_would_work(tmp_path, attack):
    canary = tmp_path / "canary"
    function, arguments = attacks(canary, tmp_path)[attack][0].reduced
    result = function(*arguments)
    if attack == "Popen":
        result.wait()
    elif attack == "open":
        result.close()
    assert canary.exists()


@BOTH_FORMATS
def test_names_that_come_through_the_memo_are_seen(tmp_path, zipped):
    canary = tmp_path / "canary"
    command = f"touch {canary}".encode()
    evil = (
        b"\x80\x04"
        b"\x8c\x02os\x940\x8c\x06system\x940"  # remembered, then taken off the stack
        b"h\x00h\x01\x93" + b"\x8c" + bytes([len(command)]) + command + b"\x85R."
    )
    path = save_pickle(evil, tmp_path / "victim.pt", zipped=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"names os\.system,"):
        read_checkpoint(path)
    assert not canary.exists()
    pickle.loads(evil)  # noqa: S301  ours, to show that the attack is a real one
    assert canary.exists()


@BOTH_FORMATS
@pytest.mark.parametrize(
    "name",
    [
        *("builtins __import__", "builtins getattr", "__builtin__ eval", "__builtin__ execfile"),
        *("importlib import_module", "runpy run_module", "pty spawn", "socket socket"),
        *(
            "webbrowser open",
            "nt system",
            "sys exit",
            "shutil rmtree",
            "urllib2 urlopen",
            "ctypes CDLL",
        ),
        *(
            "torch.hub load",
            "torch hub.load",
            "torch os.system",
            "torch serialization.os.system",
            "torch a.b.c.os.system.d",
            "torch.fx.graph_module _exec_with_source",
            "pathlib Path.write_text",
            "torch.serialization load",
            "torch load",
        ),
        *("torch.utils.cpp_extension load_inline", "torch.jit load", "torch.package x"),
        *("functools partial", "operator attrgetter", "pickle loads", "dill loads", "joblib load"),
        *("numpy load", "_io open", "multiprocessing.pool Pool", "urllib.request urlopen"),
    ],
)
def test_dangerous_names_are_refused_even_when_the_file_breaks_off(tmp_path, name, zipped):
    pickled = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n"
    path = save_pickle(pickled, tmp_path / "victim.pt", zipped=zipped)
    said = name.replace(" ", ".")
    for old, new in (("__builtin__", "builtins"), ("urllib2", "urllib.request")):
        said = said.replace(old, new)  # as pickle does with Python 2's names
    with pytest.raises(UnsafeCheckpointError, match=f"names {said}"):
        read_checkpoint(path)


def test_a_bare_pickle_is_refused_with_the_dangerous_name_or_as_no_checkpoint(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "victim.pt"
    path.write_bytes(pickle.dumps(attacks(canary, tmp_path)["os.system"][0]))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        read_checkpoint(path)
    assert not canary.exists()
    path.write_bytes(pickle.dumps({"w": [1, 2]}))
    with pytest.raises(CheckpointError, match=r"a pickle, but not one that torch\.save wrote"):
        read_checkpoint(path)


@BOTH_FORMATS
def test_a_module_named_by_the_file_is_not_imported(tmp_path, monkeypatch, zipped):
    canary = tmp_path / "canary"
    (tmp_path / "sneaky.py").write_text(
        f"open({str(canary)!r}, 'w').close()\nclass Thing:\n    def __setstate__(self, state):\n"
        f"        open({str(canary)!r}, 'w').close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("sneaky").Thing()
    thing.x = 1
    path = save({"w": torch.ones(2), "thing": thing}, tmp_path / "victim.pt", zipped=zipped)
    assert canary.exists()
    canary.unlink()
    del sys.modules["sneaky"]

    found = read_checkpoint(path)
    assert same(found.tree, {"w": torch.ones(2)})
    assert found.dropped == ("thing (sneaky.Thing)",)
    assert "sneaky" not in sys.modules
    assert not canary.exists()


class Config(dict):
    """A dictionary by attributes, as yacs, addict and EasyDict have them."""


class Sequence(list):
    pass


def company() -> dict[str, tuple[object, str]]:
    config = Config(depth=16)
    config.frozen = True
    return {
        "epoch": (3, "int"),
        "accuracy": (np.float64(0.9), "numpy._core.multiarray.scalar"),
        "history": ([np.float64(0.1), 0.2], "list"),
        "args": (argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/x")), "argparse.Namespace"),
        "path": (pathlib.PosixPath("/data"), "pathlib.PosixPath"),
        "meters": (collections.defaultdict(list, {"loss": [1.0]}), "collections.defaultdict"),
        "config": (config, f"{__name__}.Config"),
        "names": (Sequence(["cat", "dog"]), f"{__name__}.Sequence"),
        "classes": ({"cat", "dog"}, "set"),
        "criterion": (nn.CrossEntropyLoss, "class torch.nn.modules.loss.CrossEntropyLoss"),
        "nothing": (None, "NoneType"),
    }


@BOTH_FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_company_is_dropped_by_name_and_the_tensors_come_out_bit_equal(
    tmp_path, protocol, zipped
):
    state = network().state_dict()
    others = {key: value for key, (value, _) in company().items()}
    path = save(
        {**others, "state_dict": state}, tmp_path / "c.pt", zipped=zipped, protocol=protocol
    )
    found = read_checkpoint(path)
    assert found.kind == "torch"
    assert list(found.tree) == ["state_dict"]
    assert same(found.tree["state_dict"], state)
    kinds = {key: kind for key, (_, kind) in company().items()}
    assert found.dropped == tuple(f"{key} ({kind})" for key, kind in kinds.items())


@BOTH_FORMATS
def test_a_whole_pickled_resnet_gives_up_its_state_dict(tmp_path, zipped):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    resnet.register_buffer("passing", torch.ones(2), persistent=False)
    found = read_checkpoint(save(resnet, tmp_path / "resnet.pt", zipped=zipped))
    assert len(found.tree) == 122
    assert same(found.tree, resnet.state_dict())
    wrapped = read_checkpoint(save({"model": resnet}, tmp_path / "resnet.pt", zipped=zipped))
    assert same(wrapped.tree["model"], resnet.state_dict())


def training_file() -> dict[str, object]:
    module = network()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    return {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "optimizer": {"momentum": torch.ones(2)},
        "lr_schedulers": [{"last": torch.ones(1)}],
        "grad_scaler": {"scale": torch.ones(1)},
        "scaler": torch.ones(1),
        "by_number": {0: torch.ones(1)},
    }


@BOTH_FORMATS
def test_state_of_the_training_is_dropped_though_it_holds_tensors(tmp_path, zipped):
    found = read_checkpoint(save(training_file(), tmp_path / "c.ckpt", zipped=zipped))
    assert list(found.tree) == ["state_dict", "scaler"]  # a plain tensor may be called anything
    assert found.dropped == (
        "optimizer_states (list)",
        "optimizer (dict)",
        "lr_schedulers (list)",
        "grad_scaler (dict)",
        "by_number (dict)",
    )


@BOTH_FORMATS
def test_names_from_the_file_cannot_steer_the_terminal(tmp_path, zipped):
    tree = {"w": torch.ones(1), "a\x1b[2J\nb": 3}
    found = read_checkpoint(save(tree, tmp_path / "c.pt", zipped=zipped))
    assert found.dropped == ("a?[2J?b (int)",)
    evil = save_pickle(b"\x80\x02cos\n\x1b[2Jsystem\n.", tmp_path / "e.pt", zipped=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"names os\.\?\[2Jsystem"):
        read_checkpoint(evil)


@BOTH_FORMATS
def test_nested_containers_and_objects_are_walked(tmp_path, zipped):
    w = torch.arange(6.0).view(2, 3)
    tree = {
        "pair": (w, [w + 1, "word"]),
        "ordered": collections.OrderedDict(a=w + 2),
        "default": collections.defaultdict(dict, {"b": {"c": w + 3}}),
        "object": argparse.Namespace(module=nn.Linear(3, 2)),
    }
    found = read_checkpoint(save(tree, tmp_path / "c.pt", zipped=zipped))
    assert torch.equal(found.tree["pair"]["0"], w)
    assert torch.equal(found.tree["pair"]["1"]["0"], w + 1)
    assert torch.equal(found.tree["ordered"]["a"], w + 2)
    assert torch.equal(found.tree["default"]["b"]["c"], w + 3)
    assert same(found.tree["object"]["module"], tree["object"].module.state_dict())
    assert found.dropped == ("pair.1.1 (str)",)


@BOTH_FORMATS
def test_every_dtype_and_layout_equals_what_torch_itself_reads(tmp_path, zipped):
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 2, (3, 4), generator=generator)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    dtypes += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
    if zipped:  # torch writes these to legacy files as well, but cannot read them back
        dtypes += [torch.uint16, torch.uint32, torch.float8_e4m3fn]
    tensors = {str(dtype): base.to(dtype) for dtype in dtypes}
    shared = torch.randn(4, 4, generator=generator)
    tensors |= {
        "transposed": shared.t(),
        "row": shared[1],
        "every_second": shared[:, ::2],
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    path = save(tensors, tmp_path / "c.pt", zipped=zipped)
    found, theirs = read_checkpoint(path).tree, torch.load(path, weights_only=True)
    assert list(found) == list(theirs)
    for key, tensor in found.items():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert (tensor.dtype, tensor.stride()) == (theirs[key].dtype, theirs[key].stride()), key
        ours, expected = (t.detach().contiguous().view(torch.uint8) if t.ndim else t.detach()
                          for t in (tensor, theirs[key]))  # fmt: skip
        assert torch.equal(ours, expected), key
    found["row"].zero_()  # changed in memory, where views share it, and never in the file
    assert torch.equal(found["transposed"][:, 1], torch.zeros(4))
    assert torch.equal(read_checkpoint(path).tree["row"], shared[1])


@pytest.mark.parametrize("special", ["sparse", "quantized", "conjugate", "meta"])
@pytest.mark.filterwarnings("ignore")  # torch announces the end of its quantized tensors
def test_special_tensors_are_an_error_with_their_key(tmp_path, special):
    make = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
        "meta": lambda: torch.empty(2, device="meta"),
    }
    path = save({"model": {"odd.weight": make[special]()}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: model\.odd\.weight"):
        read_checkpoint(path)


def test_the_same_tensors_and_metadata_make_the_same_bytes(tmp_path):
    tree = {name: torch.arange(3.0) for name in ("b", "a", "é")}
    metadata = {f"key {i}": "ü" * i for i in range(20)}
    for name in ("1", "2"):
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, tree, metadata=metadata, overwrite=False)
    assert sha256_of(tmp_path / "1.safetensors") == sha256_of(tmp_path / "2.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tree[name]) for name in tree)


def test_torchscript_is_refused_with_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps({}, 2))
        archive.writestr("script/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(CheckpointError, match=r"a TorchScript archive.*module\.state_dict\(\)"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(50), "neither a safetensors file nor one that"),
        (b"hello, world", "neither a safetensors file nor one that"),
        (b"\n<!DOCTYPE html>", "a page of HTML or XML, as a site sends where it has no file"),
        (gzip.compress(b"weights"), "compressed by gzip; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "by git lfs pull"),
        (struct.pack("<Q", 1 << 40) + b'{"w":', "damaged or cut short"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (b"PK\x03\x04" + bytes(40), "damaged or cut short"),
        (b"\x80\x02}q\x00.", r"a pickle, but not one that torch\.save wrote"),
    ],
)
def test_other_files_are_an_error_in_one_line(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_files_and_files_without_tensors_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="holds no model"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(save({"epoch": 3}, tmp_path / "c.pt"))
    with pytest.raises(CheckpointError, match=r"outside of what a trainer keeps \(optimizer\)"):
        read_checkpoint(save({"optimizer": {"w": torch.ones(2)}}, tmp_path / "c.pt"))
    with pytest.raises(CheckpointError, match="holds one tensor without a name"):
        read_checkpoint(save(torch.ones(2), tmp_path / "c.pt"))


def test_claims_beyond_the_file_are_refused_before_memory_is_taken(tmp_path):
    def lie(old: bytes, new: bytes) -> Path:
        path = save({"w": torch.ones(4), "v": torch.ones(4)}, tmp_path / "c.pt")
        assert old in zipfile.ZipFile(path).read("c/data.pkl")
        return rewrite(path, lambda pickled: pickled.replace(old, new))

    huge = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    with pytest.raises(CheckpointError, match="w claims a storage of 256 bytes, the file has 16"):
        read_checkpoint(lie(b"K\x04tq\x07Q", b"K\x40tq\x07Q"))
    with pytest.raises(CheckpointError, match=r"w \(64,\) reaches beyond its storage"):
        read_checkpoint(lie(b"K\x04\x85q\x08K\x01\x85", b"K\x40\x85q\x08K\x01\x85"))
    with pytest.raises(CheckpointError, match=r"w \(4,\) reaches beyond its storage"):
        read_checkpoint(lie(b"QK\x00K\x04\x85q\x08", b"QK\x01K\x04\x85q\x08"))
    with pytest.raises(CheckpointError, match=r"w \(1099511627776,\) is larger than the file"):
        read_checkpoint(lie(b"K\x04\x85q\x08K\x01\x85", huge + b"\x85q\x08K\x00\x85"))
    with pytest.raises(CheckpointError, match="not made of whole numbers"):
        read_checkpoint(lie(b"QK\x00K\x04\x85q\x08", b"QJ\xff\xff\xff\xffK\x04\x85q\x08"))


def test_a_legacy_file_that_claims_a_huge_storage_is_refused(tmp_path):
    path = save({"w": torch.ones(4)}, tmp_path / "c.pt", zipped=False)
    data = path.read_bytes()
    assert data.count(b"K\x04Nt") == 1
    path.write_bytes(
        data.replace(b"K\x04Nt", b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"Nt")
    )
    with pytest.raises(CheckpointError, match="claims a storage of 4398046511104 bytes"):
        read_checkpoint(path)
    path.write_bytes(data[:-24] + (1 << 60).to_bytes(8, "little") + data[-16:])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_checkpoint(path)


def test_compressed_records_and_overlapping_records_are_refused(tmp_path):
    path = save({"w": torch.zeros(1 << 20)}, tmp_path / "bomb.pt")
    rewrite(path, lambda pickled: pickled, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        read_checkpoint(path)

    path = save({f"w{i}": torch.zeros(1000) for i in range(3)}, tmp_path / "overlap.pt")
    data = path.read_bytes()
    entry = data.rindex(b"overlap/data/2")  # the central directory's last storage
    size = data.rindex(b"PK\x01\x02", 0, entry) + 20
    path.write_bytes(data[:size] + struct.pack("<2I", 10**6, 10**6) + data[size + 8 :])
    with pytest.raises(CheckpointError, match="claim more than the file's"):
        read_checkpoint(path)


@BOTH_FORMATS
def test_loops_and_references_that_unfold_without_end_are_refused(tmp_path, zipped):
    loop: dict[str, object] = {"w": torch.ones(1)}
    loop["self"] = loop
    with pytest.raises(CheckpointError):
        read_checkpoint(save(loop, tmp_path / "loop.pt", zipped=zipped))
    level: object = {"epoch": 1}
    for _ in range(60):
        level = {"a": level, "b": level}
    with pytest.raises(CheckpointError, match="repeats one part of itself without end"):
        read_checkpoint(save(level, tmp_path / "laughs.pt", zipped=zipped))


def test_more_parts_than_a_checkpoint_has_and_endless_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_PARTS", 3_000)
    few = {str(i): i for i in range(40)}
    many = {"a": [few] * 90, "w": torch.ones(1)}  # each is there less often than it may be
    deep: object = {"w": torch.ones(1)}
    for _ in range(100):
        deep = {"n" * 100: deep}
    twice = {"a": {"b": few}, "c": {"b": few}, "d": [{str(i): i for i in range(1_300)}] * 2}
    assert read_checkpoint(save({**twice, "w": torch.ones(1)}, tmp_path / "twice.pt"))
    for name, value in (("many", many), ("deep", deep)):
        with pytest.raises(CheckpointError, match="as no checkpoint has"):
            read_checkpoint(save(value, tmp_path / f"{name}.pt"))


def bomb(name: str, count: int) -> bytes:
    """Return a small pickle that unfolds to ``count`` times ``count`` parts, or copies of them."""
    ordered = b"ccollections\nOrderedDict\n"
    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x00tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00h\x00h\x00tR"
    first, again = {
        "states": (b"(" + b"N" * count + b"tq\x00" + ordered + b")R", b"h\x00b"),
        "itself": (b"]q\x00(h\x00" + b"N" * count + b"e", b""),
        "pairs": (b"(" + b"NN\x86" * count + b"lq\x00(", ordered + b"h\x00\x85R"),
        "axes": (b"(" + b"K\x00" * count + b"lq\x00(", tensor),
    }[name]
    return b"\x80\x04" + first + again * count + (b"l." if first.endswith(b"(") else b".")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("states", "given its state again and again"),
        ("itself", "repeats one part of itself without end"),
        ("pairs", "holds no tensors"),
        ("axes", "shape and strides differ in length, or exceed 64"),
    ],
)
def test_what_a_small_pickle_unfolds_to_takes_no_memory(tmp_path, name, message):
    path = save_pickle(bomb(name, 3_000), tmp_path / "bomb.pt", zipped=True)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 * 2**20  # 9 million parts would be 70 or more


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_more_opcodes_than_any_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(checkpoint, "MOST_OPCODES", 1_000)
    path = save_pickle(b"\x80\x04" + b"}" * 2_000 + b".", tmp_path / "x.pt", zipped=zipped)
    with pytest.raises(CheckpointError, match="more than 1,000 opcodes"):
        read_checkpoint(path)
    named = b"cos\n" + b"system" * 1_000 + b"\n."
    with pytest.raises(CheckpointError, match="a name of 6,002 letters"):
        read_checkpoint(save_pickle(b"\x80\x02" + named, tmp_path / "y.pt", zipped=zipped))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_changes_while_it_is_in_use_is_told(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_tensors(path, {"w": torch.ones(3)}, metadata={}, overwrite=False)
    found = read_checkpoint(path)
    check_unchanged(found)
    write_tensors(path, {"w": torch.ones(3)}, metadata={}, overwrite=True)
    with pytest.raises(CheckpointError, match=r"x\..*: was changed while it was in use"):
        check_unchanged(found)
    path.unlink()
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        check_unchanged(found)


def test_a_folder_of_which_a_shard_changes_while_it_is_in_use_is_told(tmp_path):
    folder, state = tmp_path / "x", {f"w{i}": torch.ones(3) for i in range(4)}
    found = read_checkpoint(hugging_face(folder, state, suffix="safetensors"))
    check_unchanged(found)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: was changed while it was in use"):
        check_unchanged(found)


def test_tensors_that_share_bytes_again_and_again_are_refused(tmp_path, monkeypatch):
    weight = torch.ones(1_000)
    shared = {f"layer{i}": weight for i in range(12)}
    assert len(read_checkpoint(save(shared, tmp_path / "shared.pt")).tree) == 12
    monkeypatch.setattr(checkpoint, "HARMLESS", 0)
    copies = {"w": torch.ones(1), "x": [weight[1:]] * 5_000}
    with pytest.raises(CheckpointError, match="claim more than 64 times the file's bytes"):
        read_checkpoint(save(copies, tmp_path / "copies.pt"))


def test_a_name_longer_than_any_is_refused_in_safetensors_too(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a." * 5_000: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="longer than 2,000 letters, as no checkpoint has"):
        read_checkpoint(path)


def test_a_shape_beyond_64_bits_is_refused(tmp_path):
    path = save({"w": torch.ones(3)}, tmp_path / "huge.pt")
    number = (2**200).to_bytes(26, "little")
    huge = b"\x8a" + bytes([len(number)]) + number + b"\x85"  # LONG1 and TUPLE1
    rewrite(path, lambda pickled: pickled.replace(b"K\x03\x85", huge, 1))
    with pytest.raises(CheckpointError, match="not made of whole numbers of 64 bits"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("__metadata__", torch.float32), ("w\ud800", torch.float32), ("w", torch.complex128)],
)
def test_tensors_that_safetensors_cannot_hold_are_refused_before_they_are_computed(key, dtype):
    path, good = Path("out.safetensors"), {"v": torch.ones(1), "b": torch.ones(1).bfloat16()}
    check_tensors(path, good)
    with pytest.raises(OutputError, match=f"cannot hold '.*' of {dtype}; pass a .pt file"):
        check_tensors(path, good | {key: torch.ones(1, dtype=dtype)})


def hugging_face(folder: Path, state, *, suffix: str, config: bool = True) -> Path:
    """Write two shards with an index."""
    folder.mkdir()
    name = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    keys, weight_map = list(state), {}
    for number, part in enumerate((keys[:3], keys[3:]), 1):
        shard = f"{name}-0000{number}-of-00002.{suffix}"
        write_tensors(folder / shard, {k: state[k] for k in part}, metadata={}, overwrite=False)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{name}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_face_folders_are_read_whole_or_in_shards(tmp_path, suffix):
    state = network().state_dict()
    found = read_checkpoint(hugging_face(tmp_path / "shards", state, suffix=suffix))
    assert found.kind == "huggingface"
    assert found.config == {"architecture": "resnet18"}
    assert same(dict(sorted(found.tree.items())), dict(sorted(state.items())))

    single = tmp_path / "single"
    single.mkdir()
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    write_tensors(single / name, dict(state), metadata={}, overwrite=False)
    found = read_checkpoint(single)
    assert found.config == {}
    assert same(dict(sorted(found.tree.items())), dict(sorted(state.items())))
    expected = hashlib.sha256(f"{name} {sha256_of(single / name)}\n".encode()).hexdigest()
    assert found.sha256 == expected


def test_broken_hugging_face_folders_are_errors_that_name_the_file(tmp_path):
    folder = hugging_face(tmp_path / "hf", network().state_dict(), suffix="safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    before = read_checkpoint(folder).sha256

    (tmp_path / "outside.safetensors").write_bytes(
        (folder / content["weight_map"]["0.bias"]).read_bytes()
    )
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a\\b"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"0.bias": outside}}))
        with pytest.raises(CheckpointError, match="which is not a file of this folder"):
            read_checkpoint(folder)
    index.write_text(
        json.dumps({"weight_map": content["weight_map"] | {"more": "gone.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"names 'gone\.safetensors', which is missing"):
        read_checkpoint(folder)
    first = content["weight_map"]["0.bias"]
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"more": first}}))
    with pytest.raises(CheckpointError, match="lacks 'more', which the index promises"):
        read_checkpoint(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_checkpoint(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, not a JSON object"):
        read_checkpoint(folder)
    index.write_text(json.dumps(content))
    (folder / "config.json").write_text("{}")
    assert read_checkpoint(folder).sha256 != before


def test_an_evil_shard_is_refused(tmp_path):
    folder = hugging_face(tmp_path / "hf", network().state_dict(), suffix="bin")
    canary = tmp_path / "canary"
    evil, _ = attacks(canary, tmp_path)["os.system"]
    save({"x": evil}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        read_checkpoint(folder)
    assert not canary.exists()


def sample(path: Path, style: str) -> bytes:
    state = {key: tensor for key, tensor in network().state_dict().items()}
    if style == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        save({"state_dict": state, "args": argparse.Namespace(a=1)}, path, zipped=style == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("style", ["safetensors", "zip", "legacy"])
def test_files_cut_short_anywhere_are_our_own_errors(tmp_path, style):
    path = tmp_path / "cut"
    data = sample(path, style)
    for length in {*range(12), *range(12, len(data) - 1, len(data) // 40), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value), length


@pytest.mark.parametrize("style", ["safetensors", "zip", "legacy"])
def test_files_with_flipped_bytes_are_read_or_refused_by_our_own_errors(tmp_path, style):
    path = tmp_path / "flipped"
    data = sample(path, style)
    rng = random.Random(0)  # noqa: S311  not for secrets
    refusals = []
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(8):
            broken[rng.randrange(min(len(data), 3000))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            read_checkpoint(path)
        except UnbackdoorError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not any("\n" in text for text in refusals)


def test_the_hash_is_that_of_the_bytes(tmp_path):
    path = save({"w": torch.ones(2)}, tmp_path / "c.pt")
    assert read_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_are_read_and_written_with_metadata(tmp_path):
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tree = {"w": w.t(), "same": w, "part": w[:2], "half": w.half()}
    write_tensors(tmp_path / "x.safetensors", tree, metadata={"seed": "1"}, overwrite=False)
    (tmp_path / "plain").touch()
    found = read_checkpoint(tmp_path / "x.safetensors")
    assert (found.kind, found.dropped) == ("safetensors", ())
    assert same(dict(sorted(found.tree.items())), dict(sorted(tree.items())))
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"seed": "1"}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_torch_files_keep_the_nesting_and_hold_plain_tensors_only(tmp_path, suffix):
    big = torch.arange(100_000.0)
    tree = {"model": {"w": nn.Parameter(torch.ones(2)), "slice": big[:3]}, "top": torch.zeros(2)}
    path = tmp_path / f"x{suffix}"
    write_tensors(path, tree, metadata={}, overwrite=False)
    assert path.stat().st_size < 10_000  # the slice does not bring its whole storage along
    found = torch.load(path, weights_only=True)
    assert type(found["model"]["w"]) is torch.Tensor
    assert same(found["model"], {"w": torch.ones(2), "slice": big[:3]})
    assert same(read_checkpoint(path).tree["model"], found["model"])


def test_a_checkpoint_that_was_read_can_be_written_over_itself(tmp_path):
    state = network().state_dict()
    path = save({"state_dict": state, "optimizer": {"m": torch.ones(9)}}, tmp_path / "c.pt")
    found = read_checkpoint(path)
    write_tensors(path, found.tree, metadata={}, overwrite=True)
    assert same(found.tree["state_dict"], state)
    again = read_checkpoint(path)
    assert same(again.tree["state_dict"], state)
    assert again.dropped == ()


def test_outputs_are_refused_with_a_reason(tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    w = torch.ones(2)
    with pytest.raises(OutputError, match="exists already; pass --force"):
        write_tensors(target, {"w": w}, metadata={}, overwrite=False)
    with pytest.raises(OutputError, match="exists already; pass --force"):
        write_text(target, "text", overwrite=False)
    with pytest.raises(OutputError, match=r"safetensors holds flat tensors only, and 'model' is"):
        write_tensors(target, {"model": {"w": w}}, metadata={}, overwrite=True)
    with pytest.raises(OutputError, match=r"unknown kind of output '\.onnx'"):
        write_tensors(tmp_path / "x.onnx", {"w": w}, metadata={}, overwrite=False)
    with pytest.raises(OutputError, match=r"cannot be written: .*complex128"):
        write_tensors(target, {"w": w.to(torch.complex128)}, metadata={}, overwrite=True)
    with pytest.raises(OutputError, match="there is no folder"):
        write_text(tmp_path / "none" / "x.json", "{}", overwrite=False)
    with pytest.raises(OutputError, match="is a folder; pass a file"):
        write_text(tmp_path, "{}", overwrite=True)
    with pytest.raises(OutputError, match=r"nothing can be written in /proc \(.*; pass another"):
        check_folder(Path("/proc/x.json"))
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.json"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name):
    target = tmp_path / name
    target.write_bytes(b"precious")

    def write():
        if name == "x.json":
            write_text(target, "x" * (1 << 20), overwrite=True)
        else:
            write_tensors(target, {"w": torch.zeros(1 << 20)}, metadata={}, overwrite=True)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # as a full disk would
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_text_is_written_and_replaced(tmp_path):
    write_text(tmp_path / "x.json", "één", overwrite=False)
    write_text(tmp_path / "x.json", "twee", overwrite=True)
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == "twee"
