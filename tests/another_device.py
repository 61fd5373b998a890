"""Runs the jobs on the CPU and on another device, so that what they write can be compared.

Where no other device is, there is one that is none: tensors of :class:`There` say that they are on
it, and are computed on the CPU. As on a GPU, an operation on tensors of two devices is an error,
and so is a generator that is not where its numbers go. What is drawn is what the CPU draws, so the
results are equal.

It is a program, for PyTorch learns of the device once for the whole process::

    python tests/another_device.py FOLDER elsewhere
    python tests/another_device.py FOLDER cuda
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import GRID_HEAD, write_shades, write_voc
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from unbackdoor.attack_jobs import make_victim
from unbackdoor.backbones import Source
from unbackdoor.bench.jobs import run_grids
from unbackdoor.detection.jobs import train_file
from unbackdoor.detection.scores import evaluate_detector
from unbackdoor.evaluation import evaluate_file
from unbackdoor.jobs import purify_file
from unbackdoor.settings import (
    ChangeSettings,
    DetectionSettings,
    PurifySettings,
    VictimSettings,
)
from unbackdoor.transfer import transfer_file

CPU, NAME = torch.device("cpu"), "elsewhere"
aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
CpuGenerator = torch.Generator


class Module:
    """What PyTorch asks of a device: one, with a generator that nobody uses."""

    state = torch.Generator().get_state()

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object) -> Tensor:
        return self.state

    def set_rng_state(self, state: Tensor, device: object) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor that says it is on ``DEVICE``."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # lets modules swap their weights
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "There":
        return There(inner["held"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "There":
        if id(self) not in memo:
            memo[id(self)] = There(self.held.clone(), self.requires_grad)
            memo[id(self)]._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``function`` gives on the CPU, on the device where it belongs."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    there = {id(x.held): x for x in tensors if isinstance(x, There)}
    strangers = [x for x in tensors if not isinstance(x, There) and x.dim()]
    if function in INDEXING:  # a tensor on a GPU may be indexed by one on the CPU
        indexes = {id(x) for x in args[1] if x is not None}
        strangers = [x for x in strangers if id(x) not in indexes]
    if there and strangers and function not in CROSSING:
        raise RuntimeError(f"{function}: tensors on two devices")
    wanted = kwargs.get("device")
    out = function(
        *tree_map(lambda x: x.held if isinstance(x, There) else x, args),
        **tree_map(lambda x: x.held if isinstance(x, There) else x, kwargs)
        | ({"device": CPU} if wanted else {}),
    )
    here = wanted.type == NAME if wanted else bool(there)
    if function is aten.copy_.default:
        here = isinstance(args[0], There)
    own = {id(x): x for x in tensors} | there  # what was changed in place is itself

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return own[id(x)] if id(x) in own else There(x) if here else x

    return tree_map(placed, out)


class Kind(type(CpuGenerator)):
    """Counts PyTorch's own among the instances."""

    def __instancecheck__(cls, x: object) -> bool:
        return type(x) in (CpuGenerator, cls)


class Generator(CpuGenerator, metaclass=Kind):
    """A generator of the CPU that says where its numbers go."""

    def __new__(cls, device: torch.device | str = CPU) -> "Generator":
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    def __init__(self, device: torch.device | str = CPU):
        pass

    @property
    def device(self) -> torch.device:
        return self.place


class Making(TorchDispatchMode):
    """Makes tensors on ``DEVICE``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Calling(TorchFunctionMode):
    """Names ``DEVICE`` in full, and sees to generators, whose class PyTorch forgets later on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def full(x: Any) -> Any:
            return DEVICE if x == NAME or x == torch.device(NAME) else x

        args = tuple(full(x) if isinstance(x, str | torch.device) else x for x in args)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device(full(kwargs["device"]))
        if function is Tensor.tolist:
            return args[0].cpu().tolist()
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return function(*args, **kwargs | {"device": CPU}).to(DEVICE)
        if (generator := kwargs.get("generator")) is not None:
            tensors = [x for x in args if isinstance(x, Tensor)]
            place = kwargs.get("device") or (tensors[0].device if tensors else CPU)
            if generator.device.type != place.type:
                raise RuntimeError(f"{function}: {place} and a generator on {generator.device}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Let there be ``DEVICE`` while inside."""
    torch.Generator = Generator
    try:
        # all of a backward pass is done by this thread, whose modes these are
        with Making(), Calling(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch.Generator = CpuGenerator


VICTIMS = [
    ("badnets", "supervised"),
    ("wanet", "supervised"),
    ("cla", "supervised"),
    ("blend", "simclr"),
]
GRID = (
    GRID_HEAD
    + """victims = "{victims}"
features = ["ours"]

[victim]
epochs = 6
batch_size = 25
learning_rate = 0.05

[cbd]
preset = "cifar10"
epochs = 1
batch_size = 8
learning_rate = 0.002
"""
)  # victims that are far from any edge, or other draws and bfloat16 change their scores
ROW = """
[[rows]]
name = "{name}"
defense = "{defense}"
labels = "{labels}"
settings = {settings}
"""
OURS = "{ preset = 'default', epochs = 2, batch_size = 16, changes = { steps = 2 } }"
ROWS = [
    ("none", "none", "none", "{}"),
    ("papers", "cbd", "none", "{}"),
    ("ours", "cbd", "none", OURS),
    ("fine-tuning", "fine-tuning", "given", "{ tuning = { epochs = 1 } }"),
    ("fine-pruning", "fine-pruning", "given", "{ tuning = { epochs = 1 } }"),
    ("nad", "nad", "given", "{ tuning = { epochs = 1 }, teacher = { epochs = 1 } }"),
    ("anp", "anp", "pseudo", "{ iterations = 4 }"),
    ("ibau", "ibau", "given", "{ rounds = 1 }"),
    ("adversarial", "adversarial", "given", "{ tuning = { epochs = 1 }, adversarial_epochs = 1 }"),
    ("contrastive", "contrastive", "none", "{ epochs = 1, batch_size = 10 }"),
    ("bcu", "bcu", "none", "{ tuning = { epochs = 1 } }"),
    ("clp", "clp", "none", "{ deviations = 3.0 }"),
]


def run_jobs(folder: Path, device: Any) -> None:
    """Run every job on ``device``; its files are in ``folder`` afterwards."""
    folder.mkdir()
    quiet: dict[str, Any] = {"device": device, "say": lambda _: None}
    data = str(write_shades(folder / "data", train=200, test=10))
    settings = VictimSettings(epochs=1, batch_size=25, augment="views")
    for name, training in VICTIMS:
        options: dict[str, Any] = {"training": training, "options": {"target": 1}, "size": 8}
        make_victim(name, data, "cifar/wrn16_1", folder, settings, **options, **quiet)
    victim = Source(folder / "badnets-supervised-seed0.safetensors", "cifar/wrn16_1")
    attack = str(folder / "badnets-supervised-seed0.json")
    evaluate_file(victim, data, attack, durable=True, out=folder / "scores.json", **quiet)
    transfer_file(victim, data, attack, labels=50, out=folder / "transfer.json", **quiet)
    ours = PurifySettings(epochs=2, batch_size=16, changes=ChangeSettings(steps=2))
    images, out = f"{data}/train", folder / "purified.safetensors"
    purify_file(victim, images, out, ours, limit=40, **quiet)
    voc = f"voc:{write_voc(folder / 'voc')}"
    tiny = DetectionSettings(
        shorter=24, longer=32, pyramid=8, box_head=16, batch_size=2, warmup=0, epochs=1
    )
    files = train_file(victim, voc, folder / "detector.safetensors", tiny, **quiet)
    evaluate_detector(files.tensors, voc, attack=attack, out=folder / "detected.json", **quiet)
    rows = [dict(zip(("name", "defense", "labels", "settings"), row, strict=True)) for row in ROWS]
    grid = folder / "grid.toml"
    text = GRID.format(data=data, victims=folder / "given")
    grid.write_text(text + "".join(ROW.format(**row) for row in rows))
    failed = run_grids([grid], folder / "cells", **quiet)
    assert failed == 0


if __name__ == "__main__":
    folder, device = Path(sys.argv[1]), sys.argv[2]
    run_jobs(folder / "cpu", "cpu")
    with elsewhere() if device == NAME else contextlib.nullcontext():
        run_jobs(folder / device, device)
