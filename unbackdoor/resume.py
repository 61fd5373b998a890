"""Keep the state of long work on disk, so that a killed run continues where it was.

A state is a safetensors file: tensors in named groups, and JSON in its metadata. It is only ever
continued by a run of the same identity: input, images, settings.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors
from torch import Tensor

from unbackdoor.cbd import EpochLosses, PurifyState
from unbackdoor.checkpoint import Tree, write_tensors
from unbackdoor.errors import OutputError, StateError
from unbackdoor.settings import DetectionSettings, PurifySettings, VictimSettings
from unbackdoor.types import Say

SECONDS_BETWEEN_STATES = 60.0  # at least, where epochs and steps are short

Groups = Mapping[str, Mapping[str, Tensor]]
Result = TypeVar("Result")


class StoredState(NamedTuple):
    """What a state file holds."""

    history: list[Any]  # one entry a finished epoch
    groups: dict[str, dict[str, Tensor]]


def is_due(kept_at: float) -> bool:
    """Tell whether a state is to be kept again, the last one being of ``kept_at`` (monotonic)."""
    return time.monotonic() - kept_at >= SECONDS_BETWEEN_STATES


def go_on(run: Callable[..., Result], state: Path, *, say: Say) -> Result:
    """Call ``run`` so that it resumes from ``state``, or begins where that is not to be used.

    Args:
        run: Takes ``resume`` and ``overwrite``.
    """
    if state.exists():
        try:
            return run(resume=True, overwrite=False)
        except StateError as error:  # of another device, or damaged
            say(f"starting again: {error}")
    return run(resume=False, overwrite=True)


def identity(settings: PurifySettings, *, checkpoint: str, images: str) -> dict[str, str]:
    """Return what has to be equal for the state of a purification to be continued.

    The number of epochs is part of it only where it shapes the schedule, so that a run with a
    constant rate can be ended early or prolonged.

    Args:
        checkpoint: Hash of the input file.
        images: Fingerprint of the image source.
    """
    values = as_texts(settings)
    if settings.schedule == "constant":
        del values["epochs"]
    return {"checkpoint": checkpoint, "images": images, **values}


def as_texts(
    settings: PurifySettings | VictimSettings | DetectionSettings,
) -> dict[str, str]:
    """Return settings as the texts that an identity is made of."""
    return {name: json.dumps(value, sort_keys=True) for name, value in asdict(settings).items()}


def save_state(path: Path, state: PurifyState, of: dict[str, str]) -> None:
    """Write the state of a purification, see :func:`write_state`."""
    write_state(path, state.history, {"student": state.student, "momentum": state.momentum}, of)


def load_state(path: Path, of: dict[str, str]) -> PurifyState:
    """Read what :func:`save_state` wrote; errors are those of :func:`read_state`."""
    history, groups = read_state(path, of, groups=("student", "momentum"), entry=EpochLosses)
    return PurifyState(tuple(history), groups["student"], groups["momentum"])


def find_state(path: Path, of: dict[str, str]) -> PurifyState | None:
    """Return what :func:`save_state` wrote; None where it is damaged, of another run or absent.

    Raises:
        OutputError: If the file cannot be read, and so may be good.
    """
    try:
        return load_state(path, of)
    except StateError:
        return None


def write_state(path: Path, history: Sequence[Any], groups: Groups, of: dict[str, str]) -> None:
    """Write a state to ``path``; a reader sees the old file or the new one, never half of one.

    Args:
        history: Of the finished epochs, as JSON can hold it.
        groups: Named tensors, by group.
        of: What has to be equal for the state to be continued.
    """
    tree: Tree = {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    metadata = {"identity": json.dumps(of), "history": json.dumps(history)}
    write_tensors(path, tree, metadata=metadata, overwrite=True)


def read_state(
    path: Path,
    of: dict[str, str],
    *,
    groups: Sequence[str],
    entry: Callable[..., Any] | None = None,
) -> StoredState:
    """Read the state that :func:`write_state` wrote.

    Args:
        groups: Those that it must have, and no others.
        entry: Makes an entry of the history of its parts; by default, it is taken as it is.

    Raises:
        StateError: If there is none, if it belongs to a run with another input or other settings,
            or if it is damaged.
        OutputError: If the file cannot be read.
    """
    check_identity(path, of)
    tensors: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                group, _, key = name.partition(".")
                tensors[group][key] = file.get_tensor(name)
        history = json.loads(metadata["history"])
        if not isinstance(history, list):
            raise ValueError("its metadata are of another kind")
        if entry is not None:
            history = [entry(*parts) for parts in history]
    except OSError as error:
        raise OutputError(f"{path}: this state cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error
    return StoredState(history, tensors)


def check_identity(path: Path, of: dict[str, str]) -> None:
    """Raise unless the state in ``path`` belongs to a run of this identity.

    Errors are those of :func:`read_state`.
    """
    if not path.exists():
        raise StateError(f"{path}: there is nothing to resume; run without --resume")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = dict(json.loads(file.metadata()["identity"]))
    except OSError as error:
        raise OutputError(f"{path}: this state cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error
    for name, wanted in of.items():
        was = found.get(name, "")  # older states have fewer names
        if was != wanted:
            raise StateError(
                f"{path}: belongs to another run: {name} was {was or 'nothing'}, now "
                f"{wanted or 'nothing'}; "
                "resume as it was started, or start again with --force"
            )


def _damaged(path: Path, error: Exception) -> StateError:
    return StateError(f"{path}: this state is damaged ({error}); start again with --force")
