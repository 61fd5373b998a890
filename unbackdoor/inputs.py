"""The checkpoint that a job reads: where it is, how it is opened, what is said about it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from unbackdoor.backbones import Loaded, open_backbone
from unbackdoor.matching import describe_match

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Which checkpoint to read, and how.

    Attributes:
        checkpoint: A file, or a Hugging Face folder.
        arch: A timm name, ``torchvision/NAME``, ``cifar/NAME`` or ``path/to/file.py:function``.
        mean: Per channel, on the [0, 1] scale; the architecture's by default.
        std: Per channel, on the [0, 1] scale; the architecture's by default.
        size: Side of the images in pixels; the architecture's by default.
        head: Name of the module that turns features into logits, or ``none``; found by itself.
        nesting: Dotted place of the state dict in the file; found by itself.
        prefix: Of its keys; found by itself.
    """

    checkpoint: Path
    arch: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    head: str | None = None
    nesting: str | None = None
    prefix: str | None = None


def open_source(source: Source) -> Loaded:
    """Open the backbone that ``source`` describes; errors are those of ``open_backbone``."""
    return open_backbone(
        source.checkpoint,
        source.arch,
        mean=source.mean,
        std=source.std,
        size=source.size,
        head=source.head,
        nesting=source.nesting,
        prefix=source.prefix,
    )


def describe_input(source: Source, loaded: Loaded, *, say: Say) -> None:
    """Say what the checkpoint is and which of its tensors are used."""
    say(f"{source.checkpoint}: {loaded.checkpoint.kind}, sha256 {loaded.checkpoint.sha256[:16]}")
    say(describe_match(loaded.match, loaded.checkpoint))
    pixels = (loaded.backbone.mean, loaded.backbone.std)
    mean, std = (", ".join(f"{value:.4g}" for value in each.flatten().tolist()) for each in pixels)
    say(f"{source.arch}: {loaded.dimension} features; pixels less mean {mean}, over std {std}")


def describe_network(source: Source, loaded: Loaded) -> dict[str, str]:
    """Return what makes a checkpoint's tensors this network, for the state of a run."""
    match, backbone = loaded.match, loaded.backbone
    return {
        "arch": source.arch,
        "place": ".".join((*match.nesting, match.prefix)),
        "head": ", ".join(backbone.head_names),
        "mean": str(backbone.mean.flatten().tolist()),
        "std": str(backbone.std.flatten().tolist()),
        "size": str(loaded.size),
    }
