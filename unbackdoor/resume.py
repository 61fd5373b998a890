"""Keep the state of a purification on disk, so that a killed run continues where it was.

A state is a safetensors file: tensors, and JSON in its metadata. It is only ever continued by a run
with the same checkpoint, images and settings.
"""

import json
from dataclasses import asdict
from pathlib import Path

import safetensors
from torch import Tensor

from unbackdoor.cbd import EpochLosses, PurifyState
from unbackdoor.checkpoint import Tree, write_tensors
from unbackdoor.errors import CheckpointError, OutputError
from unbackdoor.settings import PurifySettings


def identity(settings: PurifySettings, *, checkpoint: str, images: str) -> dict[str, str]:
    """Return what has to be equal for a state to be continued.

    The number of epochs is part of it only where it shapes the schedule, so that a run with a
    constant rate can be ended early or prolonged.

    Args:
        checkpoint: Hash of the input file.
        images: Fingerprint of the image source.
    """
    values = asdict(settings)
    if settings.schedule == "constant":
        del values["epochs"]
    flat = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
    return {"checkpoint": checkpoint, "images": images, **flat}


def save_state(path: Path, state: PurifyState, of: dict[str, str]) -> None:
    """Write ``state`` to ``path``; a reader sees the old file or the new one, never half of one."""
    tree: Tree = {
        **{f"student.{name}": tensor for name, tensor in state.student.items()},
        **{f"momentum.{name}": tensor for name, tensor in state.momentum.items()},
    }
    metadata = {"identity": json.dumps(of), "history": json.dumps(state.history)}
    write_tensors(path, tree, metadata=metadata, overwrite=True)


def load_state(path: Path, of: dict[str, str]) -> PurifyState:
    """Read the state that :func:`save_state` wrote.

    Raises:
        OutputError: If there is none, or it belongs to a run with another input or other settings.
        CheckpointError: If the file is damaged.
    """
    if not path.exists():
        raise OutputError(f"{path}: there is nothing to resume; run without --resume")
    tensors: dict[str, dict[str, Tensor]] = {"student": {}, "momentum": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                kind, _, key = name.partition(".")
                tensors[kind][key] = file.get_tensor(name)
        found = json.loads(metadata["identity"])
        history = tuple(EpochLosses(*epoch) for epoch in json.loads(metadata["history"]))
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: this state is damaged ({error}); start again with --force"
        ) from error
    for name, wanted in of.items():
        if found.get(name) != wanted:
            raise OutputError(
                f"{path}: belongs to another run: {name} was {found.get(name)}, now {wanted}; "
                "resume as it was started, or start again with --force"
            )
    return PurifyState(history, tensors["student"], tensors["momentum"])
