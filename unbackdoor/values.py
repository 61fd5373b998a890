"""Values of dataclasses out of files and command lines, checked by the types of the fields."""

import contextlib
import math
from collections import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unbackdoor.errors import SettingsError, unknown

WORDS: Mapping[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number or a ratio",
    bool: "true or false",
    tuple: "a list",
    dict: "a table",
}


def made(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    """Return a dataclass made of a table as JSON and TOML have them.

    Args:
        table: By field.
        where: What errors name first.

    Raises:
        SettingsError: If a name lacks or is unknown, or a value is of another kind or out of range.
    """
    needed = {
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING
    }
    hints = get_type_hints(kind)
    for name in table:
        if name not in hints:
            raise SettingsError(f"{where}: {unknown('key', name, hints)}")
    if missing := sorted(needed - table.keys()):
        raise SettingsError(f"{where}: lacks {', '.join(missing)}")
    values = {}
    for name, value in table.items():
        values[name] = read_value(hints[name], value, name, where=where)
    return kind(**values)


def changed(
    defaults: Any,
    table: Mapping[str, Any],
    where: str,
    *,
    texts: bool = False,
    prefix: str = "",
) -> Any:
    """Return a dataclass with the values of ``table`` in place of its own.

    All are put in at once, for some may only be right together.

    Args:
        table: By field, nested as the dataclass.
        where: What errors name first.
        texts: Whether values are texts of a command line, see :func:`read_value`.
        prefix: What errors put before a name.

    Raises:
        SettingsError: If a name is unknown, or a value is of another kind or out of range.
    """
    hints = get_type_hints(type(defaults))
    values = {}
    for name, value in table.items():
        full = f"{prefix}{name}"
        if name not in hints:
            raise SettingsError(f"{where}: {unknown('setting', name, hints, prefix=prefix)}")
        before = getattr(defaults, name)
        if not is_dataclass(before):
            values[name] = read_value(hints[name], value, full, where=where, texts=texts)
        elif isinstance(value, Mapping):
            values[name] = changed(before, value, where, texts=texts, prefix=f"{full}.")
        else:
            raise SettingsError(f"{where}: {full} is a table of settings, got {value!r}")
    try:
        return replace(defaults, **values)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def settings_from(defaults: Any, values: Sequence[str]) -> Any:
    """Return a settings dataclass with ``values`` in place of its defaults.

    Args:
        values: ``name=value``; a name inside another has a dot, as ``tuning.epochs=5``; a ratio
            such as ``8/255`` is a number, numbers with commas between them are a tuple.

    Raises:
        SettingsError: If a name is unknown, or a value of another kind or out of range.
    """
    names = [name for name, _ in flatten(asdict(defaults))]
    leaves = []
    for text in values:
        written, sign, value = text.partition("=")
        name = written.strip().replace("-", "_")
        if not sign:
            raise SettingsError(f"--set takes name=value, got {text!r}")
        if name not in names:
            none = "" if names else "none"
            raise SettingsError(unknown("--set", name, names, others=none))
        leaves.append((name, value.strip()))
    return changed(defaults, nested(leaves), "--set", texts=True)


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return values with dotted names as nested tables."""
    table: dict[str, Any] = {}
    for name, value in leaves:
        *outer, last = name.split(".")
        place = table
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return table


def flatten(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested tables with dotted names: what :func:`nested` undoes."""
    leaves: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            leaves += flatten(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves


def read_value(kind: Any, value: Any, name: str, *, where: str, texts: bool = False) -> Any:
    """Return ``value`` as the type of a field.

    A number may be a ratio, such as ``"8/255"``; ``"none"`` is None where that may be, unless it is
    one of the choices of a field. A dataclass is taken as it is.

    Args:
        kind: Of the field. Of a union that is not of None, a value is of its own type or else the
            first; a text is the first that it can be, and itself at last.
        name: Of the field, for errors.
        where: What errors name first.
        texts: Whether a text may stand for a number, for true or false, and, with commas, for a
            list.

    Raises:
        SettingsError: If it is of another kind.
    """
    if is_dataclass(value):
        return value
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        is_a_choice = any(value in get_args(each) for each in kinds if get_origin(each) is Literal)
        written = value.lower() if texts and isinstance(value, str) else value
        if written in (None, "none") and len(kinds) < len(get_args(kind)) and not is_a_choice:
            return None
        if texts and len(kinds) > 1:
            return _read_first(kinds, value, name, where=where)
        kind = next((each for each in kinds if type(value) is each), kinds[0])
    if get_origin(kind) is Literal:
        known = {str(each) if texts else each: each for each in get_args(kind)}
        if isinstance(value, abc.Hashable) and value in known:
            return known[value]
        choices = [str(each) for each in known]
        if str(value) in choices:  # a text for a number, say
            raise SettingsError(f"{where}: {name} is one of {', '.join(choices)}, got {value!r}")
        raise SettingsError(f"{where}: {unknown(name, value, choices)}")
    wanted = get_origin(kind) or kind
    wanted = dict if wanted is abc.Mapping else wanted
    if wanted is tuple:
        parts = value.split(",") if texts and isinstance(value, str) else value
        if isinstance(parts, list | tuple):
            return _read_list(list(get_args(kind)), parts, name, where=where, texts=texts)
    elif isinstance(value, str) and (texts or kind is float):
        with contextlib.suppress(ValueError, KeyError, ZeroDivisionError):
            value = _from_text(kind, value)  # or else the message below
    elif kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    elif wanted is dict and texts:
        raise SettingsError(f"{where}: {name} is a table, which no text can be")
    finite = texts or not isinstance(value, float) or math.isfinite(value)
    if type(value) is not wanted or not finite:
        words = WORDS.get(wanted, f"of type {getattr(wanted, '__name__', wanted)}")
        raise SettingsError(f"{where}: {name} is {words}, got {value!r}")
    return value


def _read_first(kinds: list[Any], value: Any, name: str, *, where: str) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is str):
        with contextlib.suppress(SettingsError):
            return read_value(kind, value, name, where=where, texts=True)
    raise SettingsError(f"{where}: {name} is of another kind, got {value!r}")


def _read_list(
    kinds: list[Any], parts: list[Any] | tuple[Any, ...], name: str, *, where: str, texts: bool
) -> tuple[Any, ...]:
    if kinds[1:] == [...]:
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise SettingsError(f"{where}: {name} is a list of {len(kinds)}, got {parts!r}")
    return tuple(
        read_value(kind, part, f"{name}[{i}]", where=where, texts=texts)
        for i, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    )


def _from_text(kind: Any, value: str) -> Any:
    if kind is float:
        above, slash, below = value.partition("/")
        return float(above) / float(below) if slash else float(above)
    if kind is bool:
        return {"true": True, "false": False}[value.lower()]
    return int(value) if kind is int else value
