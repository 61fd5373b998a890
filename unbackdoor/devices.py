"""Where to compute, in which precision, and how much memory it took."""

import contextlib
import copy
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unbackdoor.errors import DeviceError, SettingsError
from unbackdoor.settings import DeviceName, PrecisionName
from unbackdoor.types import Images

Precision: TypeAlias = Literal["fp32", "bf16"]
Network = TypeVar("Network", bound=nn.Module)


def pick_device(name: DeviceName) -> torch.device:
    """Return the device ``name``; ``auto`` is the first there is of CUDA, MPS, CPU.

    Raises:
        SettingsError: If this machine or this PyTorch lacks the device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there.get(name, True):
        raise SettingsError(
            f"device {name!r} is not available here; pass --device auto or --device cpu"
        )
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Return the device in words, with the threads of a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, TF32 in convolutions" if torch.backends.cudnn.allow_tf32 else name
    return f"{device}, {torch.get_num_threads()} threads"


def pick_precision(name: PrecisionName, device: torch.device) -> Precision:
    """Return the precision ``name``; ``auto`` is bf16 where CUDA computes it, fp32 elsewhere."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp32"
    return name


class InBfloat16(nn.Module):
    """Runs a network in bfloat16 and returns float32; its weights stay float32.

    Autocast covers the network's own pass alone, so that views, search and losses stay exact, and
    keeps no cast weights, which would outlive an optimizer's step.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, cache_enabled=False):
            output: Tensor = self.network(images)
        return output.float()


def in_precision(network: nn.Module, precision: Precision) -> nn.Module:
    """Return ``network``, to be run in ``precision``; both share their weights."""
    return network if precision == "fp32" else InBfloat16(network)


def fast_layout(network: nn.Module, device: torch.device | None = None) -> torch.memory_format:
    """Return the memory layout in which ``network``'s convolutions are fast: channels last.

    Contiguous on MPS, where batch norm's gradients in channels last were wrong
    (pytorch/pytorch#175189), and where a strided convolution of single pixels has few input
    channels, as RepVGG's first one: on a CPU its weight gradient in channels last writes outside
    its memory (oneDNN in PyTorch 2.15; seen with 3 and 5 channels, not with 12).

    Args:
        device: Where it will be run; by default, where its weights are.
    """
    device = device or next((weight.device for weight in network.parameters()), None)
    if device is not None and device.type == "mps":
        return torch.contiguous_format
    crashes = any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < 12
        for layer in network.modules()
    )
    return torch.contiguous_format if crashes else torch.channels_last


def laid_out(network: Network) -> Network:
    """Return ``network``, put in place into its :func:`fast_layout`."""
    return network.to(memory_format=fast_layout(network))


def frozen_twin(network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` in eval mode that shares its tensors, for gradients to images.

    Weights that an optimizer moves in place are moved in both. Those of the twin ask for no
    gradient: a compiler would compute it, wanted or not.
    """
    shared: dict[int, Tensor] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in network.parameters()
    }
    shared |= {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, shared).eval()


def compile_for_search(network: nn.Module, images: Images) -> None:
    """Compile ``network``, a frozen one, in place, for gradients to images alone.

    What was compiled before is forgotten: PyTorch counts all networks of a class together, and runs
    the ninth uncompiled, with no more than a line in its log.

    Args:
        images: A batch to try it on, of the shape to come.

    Raises:
        SettingsError: If PyTorch cannot compile it here.
    """
    torch.compiler.reset()
    network.compile(dynamic=False)
    tried = images.detach().requires_grad_(True)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            torch.autograd.grad(network(tried).sum(), tried)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler of this machine fails with
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"this network cannot be compiled here ({reason}); run it without --compile"
        ) from error


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN choose deterministic kernels while inside; elsewhere nothing changes."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators while inside, for dropout draws from nothing else."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # not torch.manual_seed, which takes its time for every backend there is, in every step
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            global_generator(device).manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def global_generator(device: torch.device) -> torch.Generator:
    """Return what dropout draws from on a CPU or a GPU; MPS's own generator cannot be had."""
    if device.type != "cuda":
        return torch.default_generator
    number = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[number]


def forget_peak(device: torch.device) -> None:
    """Begin to count :func:`peak_memory` anew, where it can be: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: on CUDA of the device's allocator, elsewhere of the process.

    On Windows it is not known, and 0.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return 0
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def flops(network: nn.Module, images: Tensor) -> float:
    """Return the floating-point operations of one forward pass, for each of ``images``.

    Convolutions and matrix products count, two operations a multiplication; all else is left out.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return float(counter.get_total_flops() / len(images))


def matrix_limit(device: torch.device, precision: Precision, *, size: int | None = None) -> float:
    """Return how many operations a second the device reaches in large matrix products, measured.

    Args:
        size: Side of the matrices; by default 8192 on CUDA and 1536 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # random, for a GPU multiplies equal numbers faster than others
    draws = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draws, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds() for _ in range(5))


def wait_for(device: torch.device) -> None:
    """Return when all that ``device`` was told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def told_of_memory(device: torch.device) -> Iterator[None]:
    """Turn what PyTorch raises when ``device`` has no memory left into a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "DefaultCPUAllocator" in str(error)  # has no class of its own
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise DeviceError(
            f"{device} is out of memory; where the command has them, pass a smaller --batch-size "
            "or --changes.group (to defend, --set tuning.batch_size or batch_size); else compute "
            "on another --device"
        ) from error
