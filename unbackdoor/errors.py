"""Errors a user can cause, as opposed to our own bugs.

::

    UnbackdoorError
    ├── UnsafeCheckpointError   the file would run code; it was not loaded
    ├── CheckpointError         the file is damaged, or holds no usable tensors
    ├── MismatchError           tensors and architecture do not fit each other
    ├── ArchitectureError       no such network, or no usable feature vector
    ├── DataError               images or labels that are missing, broken, too few
    │   └── UnlabeledError      the source has no labels
    ├── SettingsError           an unknown option, or a value outside its range
    ├── OutputError             the output exists, or cannot be written
    │   └── StateError          a state that cannot be gone on from
    ├── DeviceError             the device has too little memory
    └── DivergedError           training ended in NaN or in a collapsed feature space
"""

import difflib
from collections.abc import Iterable


def unknown(
    what: str, name: object, known: Iterable[str], *, others: str = "", prefix: str = ""
) -> str:
    """Return a message that a name is none of ``known``, with the nearest one, or with all.

    Args:
        prefix: What all names are printed with.
    """
    names = list(known)
    nearest = difflib.get_close_matches(str(name), names, n=1)
    shown = f"{prefix}{name}" if isinstance(name, str) else name
    there = f"there are {', '.join(f'{prefix}{each}' for each in names)}{others}"
    hint = f"did you mean {prefix + nearest[0]!r}?" if nearest else there
    return f"{what} {shown!r} is unknown; {hint}"


def printable(text: str) -> str:
    """Return ``text`` from a file with ``?`` for whatever could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def printable_lines(text: str) -> str:
    """Return lines that may quote a file, each as :func:`printable` has it."""
    return "\n".join(map(printable, text.split("\n")))


class UnbackdoorError(Exception):
    """Base of all errors below; the command line prints it without a traceback and exits with 2."""


class UnsafeCheckpointError(UnbackdoorError):
    """The checkpoint names something dangerous, or cannot be read without running its code."""


class CheckpointError(UnbackdoorError):
    """The checkpoint is damaged, of an unknown format, or holds no usable tensors."""


class MismatchError(UnbackdoorError):
    """The checkpoint's tensors do not fit the architecture."""


class ArchitectureError(UnbackdoorError):
    """The architecture is unknown, or does not map images to one feature vector each."""


class DataError(UnbackdoorError):
    """Images or labels are missing, broken, too few or out of range."""


class UnlabeledError(DataError):
    """Labels are asked for and the source has none."""


class SettingsError(UnbackdoorError):
    """A setting is unknown or outside its range."""


class OutputError(UnbackdoorError):
    """The output exists already, or cannot be written."""


class StateError(OutputError):
    """There is no state of an interrupted run, or it is damaged or of another run."""


class DeviceError(UnbackdoorError):
    """The device has too little memory."""


class DivergedError(UnbackdoorError):
    """Training ended in NaN or in a collapsed feature space; the last good state is kept."""
