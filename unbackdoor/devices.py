"""Where to compute, in which precision, and how much memory it took."""

import contextlib
import resource
import sys
from typing import Literal, TypeAlias

import torch

from unbackdoor.errors import SettingsError

Precision: TypeAlias = Literal["fp32", "bf16"]


def pick_device(name: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
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


def pick_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """Return the precision ``name``; ``auto`` is bf16 where CUDA computes it, fp32 elsewhere."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp32"
    return name


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[None]:
    """Return a context in which networks run in ``precision``; weights stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
