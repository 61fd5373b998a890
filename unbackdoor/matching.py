"""Fit the tensors of a checkpoint to the keys of a network, by names and shapes only."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbackdoor.checkpoint import Checkpoint, Tree
from unbackdoor.errors import MismatchError, printable

# Other names of the same module: what the network calls it -> what the file may call it.
SPELLINGS: tuple[Mapping[str, str], ...] = (
    {},
    {"downsample": "shortcut"},
    {"shortcut": "downsample"},
    {"fc": "linear"},
    {"linear": "fc"},
    {"downsample": "shortcut", "fc": "linear"},
    {"shortcut": "downsample", "linear": "fc"},
)

# Words of the copy to take last, where several fit: the trained network comes before its moving
# average (``encoder_q`` before ``encoder_k``, ``online`` before ``target``), except that DINO's
# users take the teacher, so the student comes last, and timm's loader takes the average of a file
# that has it under one of the names of ``TAKEN_FIRST``.
TAKEN_LAST = frozenset({"k", "key", "momentum", "target", "ema", "swa", "averaged", "student"})
TAKEN_FIRST = (("state_dict_ema",), ("model_ema",))

# What moves a network's output, by the last part of its name; buffers and mask tokens do not.
WEIGHT = re.compile(r"weight|bias|gamma(_\d)?|lora_[AB]")
TOKEN = re.compile(r"register_tokens?|reg_token")
# Weights of published files that their own networks never use: DLA's spare projections, and the
# auxiliary batch norms that timm trains with.
DEAD = re.compile(r"level\d\.(.*\.)?project\.\d\.|\.aux_bn\.")

COUNTER = "num_batches_tracked"  # of batch norms; older files have none, and it moves no output
MOST_PREFIXES = 20  # tried for each state dict and spelling
MOST_STATE_DICTS = 200  # looked through in one file
DEEPEST = 16  # names in a prefix before foreign names
MOST_LINES = 12  # of a table in an error, of groups in the account

Rename = Callable[[Mapping[str, Tensor]], Mapping[str, str]]
"""From a state dict of foreign names to: network key -> foreign name, as far as known."""


@dataclass(frozen=True)
class Match:
    """Which tensor of a checkpoint belongs to which key of a network.

    Attributes:
        nesting: Path of the chosen state dict in the tree, ``("state_dict",)``.
        prefix: What its keys have before the network's own names, ``"module.encoder_q."``.
        keys: Network key -> key in that state dict, for the body and, if it is there, the head.
        head: Those network keys among ``keys`` that are head.
        left_over: Keys of the chosen state dict that nothing asked for.
        shared: Other names in the file of the very same tensors, as a module has that stands in two
            places: their path in the tree, their key there, and the key among ``keys``' values.
        other: Other places in the file that would have fitted as well, dotted.
        missing: Network keys that may be absent and are: batch norms' counters.
    """

    nesting: tuple[str, ...]
    prefix: str
    keys: Mapping[str, str]
    head: tuple[str, ...]
    left_over: tuple[str, ...]
    shared: tuple[tuple[tuple[str, ...], str, str], ...]
    other: tuple[str, ...]
    missing: tuple[str, ...]


def match_keys(
    checkpoint: Checkpoint,
    expected: Mapping[str, torch.Size],
    *,
    head: tuple[str, ...] = (),
    nesting: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
) -> Match:
    """Find where a checkpoint holds a network's tensors.

    Every state dict in the file is tried with every prefix that its own keys suggest. Where several
    hold the whole body, the first counts that: has no weights inside the body that the network
    lacks, is of ``TAKEN_FIRST``, has no word of ``TAKEN_LAST`` in its place, has the head, is
    nested least, has the shortest prefix, stands first in the file.

    Args:
        checkpoint: As read.
        expected: All keys of the network, body and head, with their shapes.
        head: Those of them that are head. They are matched by name whatever their first dimension,
            the number of classes, and may be absent.
        nesting: Look only in this state dict, dotted; empty for the top of the file.
        prefix: Try only this prefix; empty for none.
        rename: Tried where no name of our own fits.

    Raises:
        MismatchError: If no state dict holds all of the body with equal shapes; or if it has
            weights inside the body that the network lacks, unless ``nesting`` or ``prefix`` is
            given.
    """
    places = [".".join(path) for path, _ in _state_dicts(checkpoint.tree, ())]
    if nesting is None and len(places) > MOST_STATE_DICTS:
        raise MismatchError(
            f"{checkpoint.path}: holds {len(places)} state dicts, such as {places[0]!r} and "
            f"{places[-1]!r}; name one by --nesting"
        )
    candidates = list(_candidates(checkpoint.tree, expected, head, nesting, prefix))
    if not candidates:
        raise MismatchError(
            f"{checkpoint.path}: holds no tensors at --nesting {nesting!r}, only at "
            f"{_shortened(map(repr, places))}"
        )
    fits = sorted((c for c in candidates if not c.unfit), key=_preference)
    if not fits and (outer := wrapper_of(key for key in expected if key not in head)):
        inner = _candidates(checkpoint.tree, expected, head, nesting, prefix, outer)
        fits = sorted((c for c in inner if not c.unfit), key=_preference)
    if not fits and rename is not None:
        renamed = _renamed(checkpoint.tree, expected, head, nesting, prefix, rename)
        fits = sorted((c for c in renamed if not c.unfit), key=_preference)
    if not fits:
        nearest = min(candidates, key=lambda c: (len(c.unfit), len(c.absent)))
        raise MismatchError(_explain(checkpoint, nearest, expected))

    chosen = fits[0]
    if chosen.foreign and nesting is None and prefix is None:
        raise MismatchError(_richer(checkpoint, chosen))
    used = set(chosen.keys.values())
    shared = _shared(checkpoint.tree, chosen)
    again = {name for path, name, _ in shared if path == chosen.nesting}
    copies = {(path, name) for path, name, _ in shared}
    apart = [
        c
        for c in fits
        if not all((c.nesting, name) in copies for key, name in c.keys.items() if key not in head)
    ]
    return Match(
        nesting=chosen.nesting,
        prefix=chosen.prefix,
        keys=chosen.keys,
        head=tuple(key for key in head if key in chosen.keys),
        left_over=tuple(key for key in chosen.tensors if key not in used | again),
        shared=shared,
        other=tuple(dict.fromkeys(c.place for c in apart if c.place != chosen.place)),
        missing=tuple(key for key in expected if key not in chosen.keys and key not in head),
    )


def without_head(match: Match) -> Match:
    """Return ``match`` with the head left over, for a file that has but a part of it."""
    keys = {key: name for key, name in match.keys.items() if key not in match.head}
    left_over = (*match.left_over, *(match.keys[key] for key in match.head))
    return replace(match, keys=keys, head=(), left_over=left_over)


def describe_match(match: Match, checkpoint: Checkpoint) -> str:
    """Return the account of a match, a few lines to print: what was taken, and what was not."""
    found = _at(checkpoint.tree, match.nesting)
    body = len(match.keys) - len(match.head)
    lines = [
        f"matched: {body} of {body + len(match.missing)} body tensors, "
        f"at {_quoted(match.nesting, match.prefix)}"
    ]
    if match.missing:
        lines.append(f"absent: {len(match.missing)} {COUNTER}, which moves no output")
    shapes = {key: found[match.keys[key]].shape for key in match.head}
    if classes := [shape[0] for shape in shapes.values() if len(shape) > 1]:
        lines.append(f"head: {', '.join(match.head)} ({classes[-1]} classes), kept as it is")
    else:
        lines.append("head: none found")
    if match.shared:
        names = _grouped(".".join((*path, name)) for path, name, _ in match.shared)
        lines.append(f"the same tensors under other names, changed with them: {names}")
    if match.left_over:
        lines.append(f"left over, kept as it is: {_grouped(match.left_over)}")
    if match.other:
        places = _shortened(place or "the top of the file" for place in match.other)
        lines.append(
            f"warning: would have fitted as well, and stays as it came, for whoever loads it: "
            f"{places} (choose by --nesting and --prefix)"
        )
    changed = {path for path, _, _ in match.shared}
    if apart := _state_dicts_beside(checkpoint.tree, {match.nesting, *changed}):
        lines.append(f"beside the matched state dict, kept as it is: {_shortened(apart)}")
    if checkpoint.dropped:
        lines.append(f"dropped: {_shortened(checkpoint.dropped)}")
    return "\n".join(lines)


def matched_tensors(checkpoint: Checkpoint, match: Match) -> dict[str, Tensor]:
    """Return the checkpoint's tensors by the network's keys."""
    found = _at(checkpoint.tree, match.nesting)
    return {key: found[name] for key, name in match.keys.items()}


def replace_tensors(checkpoint: Checkpoint, match: Match, state: Mapping[str, Tensor]) -> Tree:
    """Return the checkpoint's tree with the matched tensors taken from ``state``.

    Args:
        checkpoint: As read; it is not changed.
        match: Of this checkpoint.
        state: A network's tensors by its keys. Each is brought to the CPU and to the dtype that it
            has in the checkpoint. Keys that did not match are ignored; matched ones that are not
            in ``state`` stay, and so do those that are in it as they were read, whatever was
            rounded in reading.

    Returns:
        A new tree; all that is not replaced is the same object as before.

    Raises:
        MismatchError: If a tensor's shape is not the checkpoint's.
    """
    found = _at(checkpoint.tree, match.nesting)
    new: Tree = {}
    for key, name in match.keys.items():
        if key in state:
            if state[key].shape != found[name].shape:
                raise MismatchError(
                    f"{key} is {_shape(state[key].shape)} in the network, "
                    f"{_shape(found[name].shape)} in {checkpoint.path}"
                )
            value = state[key].detach().cpu()
            if not value.equal(found[name].to(value.dtype)):
                new[name] = value.to(found[name].dtype)
    tree = _merged(checkpoint.tree, match.nesting, new)
    again: dict[tuple[str, ...], Tree] = {}
    for path, name, matched in match.shared:
        if matched in new:
            again.setdefault(path, {})[name] = new[matched]
    for path, copies in again.items():
        tree = _merged(tree, path, copies)
    return tree


def flat_tree(match: Match, tree: Tree) -> dict[str, Tensor]:
    """Return the matched state dict of ``tree`` with all of its keys, as one flat file holds it.

    What stands beside it in the tree is not included; ``state_dicts_apart`` names that.
    """
    return _at(tree, match.nesting)


def state_dicts_apart(match: Match, tree: Tree) -> list[str]:
    """Return the state dicts of ``tree`` other than the matched one, ``teacher (122 tensors)``."""
    return _state_dicts_beside(tree, {match.nesting})


def _state_dicts_beside(tree: Tree, known: Container[tuple[str, ...]]) -> list[str]:
    return [
        f"{'.'.join(path) or 'top'} ({len(tensors)} tensor{'s' * (len(tensors) > 1)})"
        for path, tensors in _state_dicts(tree, ())
        if path not in known
    ]


@dataclass(frozen=True)
class _Candidate:
    """One way to read a network's body out of the file."""

    nesting: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]  # network key -> key in ``tensors``, where name and shape fit
    unfit: Mapping[str, str]  # the same where they do not, though the body needs them
    foreign: tuple[str, ...] = ()  # keys of weights inside the body's modules that it lacks

    @property
    def place(self) -> str:
        return ".".join((*self.nesting, self.prefix)).strip(".")

    @property
    def absent(self) -> list[str]:
        return [key for key, name in self.unfit.items() if name not in self.tensors]


def _candidates(
    tree: Tree,
    expected: Mapping[str, torch.Size],
    head: tuple[str, ...],
    nesting: str | None,
    prefix: str | None,
    outer: str = "",
) -> Iterator[_Candidate]:
    """Yield every reading that the file's own keys suggest, and at least one a state dict.

    Args:
        outer: What the network's own keys begin with, and the file's do not.
    """
    spellings: list[dict[str, str]] = []
    for spelling in SPELLINGS:
        spelled = {_spell(key.removeprefix(outer), spelling): key for key in expected}
        # fewer where the network uses both words, for different modules
        if len(spelled) == len(expected) and spelled not in spellings:
            spellings.append(spelled)
    for path, tensors in _state_dicts(tree, ()):
        if nesting is not None and nesting != ".".join(path):
            continue
        for spelled in spellings:
            if prefix is None:
                prefixes = _suggested_prefixes(tensors, spelled)
            else:
                prefixes = [_dotted(prefix)]
            for start in prefixes:
                found = _candidate(path, start, tensors, expected, head, spelled)
                if not found.unfit:
                    words = {name[len(start) :]: name for name in tensors if name.startswith(start)}
                    foreign = _foreign(words, set(found.keys.values()), head, spelled)
                    found = replace(found, foreign=foreign)
                yield found


def _candidate(
    path: tuple[str, ...],
    prefix: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    head: tuple[str, ...],
    spelled: Mapping[str, str],
) -> _Candidate:
    """Read a state dict by names, ``spelled``: name after the prefix -> network key."""
    keys: dict[str, str] = {}
    unfit: dict[str, str] = {}
    for word, key in spelled.items():
        name = prefix + word
        if name in tensors and _fits(tensors[name].shape, expected[key], key in head):
            keys[key] = name
        elif key not in head and not (key.endswith(COUNTER) and name not in tensors):
            unfit[key] = name
    return _Candidate(path, prefix, tensors, keys, unfit)


def _renamed(
    tree: Tree,
    expected: Mapping[str, torch.Size],
    head: tuple[str, ...],
    nesting: str | None,
    prefix: str | None,
    rename: Rename,
) -> Iterator[_Candidate]:
    """Yield every reading by foreign names, under every prefix that most keys of a place have."""
    for path, tensors in _state_dicts(tree, ()):
        if nesting is not None and nesting != ".".join(path):
            continue
        votes = Counter(
            "".join(f"{part}." for part in name.split(".")[:i])
            for name in tensors
            for i in range(min(name.count("."), DEEPEST) + 1)
        )
        common = [start for start, count in votes.items() if count > len(tensors) / 2]
        for start in common if prefix is None else [_dotted(prefix)]:
            inside = {
                name.removeprefix(start): tensor
                for name, tensor in tensors.items()
                if name.startswith(start)
            }
            renamed = rename(inside)
            names = {key: name for key, name in renamed.items() if key in expected}
            spelled = {names.get(key, key): key for key in expected}
            if len(spelled) == len(expected):  # else one tensor would be two of the network's
                found = _candidate(path, start, tensors, expected, head, spelled)
                words = {key: start + name for key, name in renamed.items()}
                own = {key: key for key in expected}
                used = set(found.keys.values())
                yield replace(found, foreign=_foreign(words, used, head, own))


def _foreign(
    words: Mapping[str, str],
    used: Container[str],
    head: tuple[str, ...],
    spelled: Mapping[str, str],
) -> tuple[str, ...]:
    """Return the weights that the file has inside the body's modules and the network has not.

    Blocks of a deeper network of the family, and branches of a richer one, stand there; projection
    heads, queues and another classifier stand beside, or in the place of the head.

    Args:
        words: What stands after the prefix -> key in the file.
        used: Keys in the file that are the network's.
        spelled: What the network's keys are after the prefix -> network key.
    """
    body = [word for word, key in spelled.items() if key not in head]
    wrapper = wrapper_of(body)  # what stands in a wrapper may stand beside what it wraps
    tops = {word[len(wrapper) :].partition(".")[0] for word in body if "." in word[len(wrapper) :]}
    listed = any(top.isdigit() for top in tops)  # of a list, the next number is inside as well
    heads = tuple(f"{word.rpartition('.')[0]}." for word, key in spelled.items() if key in head)
    foreign = []
    for word, name in words.items():
        rest = word.removeprefix(wrapper)
        top, dot, inner = rest.partition(".")
        if name in used or (wrapper and rest == word) or word.startswith(heads):
            continue
        inside = dot and (top in tops or (listed and top.isdigit()))
        weight = inside and WEIGHT.fullmatch(inner.rpartition(".")[2]) and not DEAD.search(rest)
        if weight or TOKEN.fullmatch(rest):
            foreign.append(name)
    return tuple(foreign)


def _shared(tree: Tree, chosen: _Candidate) -> tuple[tuple[tuple[str, ...], str, str], ...]:
    """Return the other names of the chosen tensors, which share their memory, see ``Match``."""
    places = {
        memory_of(chosen.tensors[name]): name
        for name in chosen.keys.values()
        if chosen.tensors[name].numel()
    }
    used = set(chosen.keys.values())
    return tuple(
        (path, name, places[memory_of(tensor)])
        for path, tensors in _state_dicts(tree, ())
        for name, tensor in tensors.items()
        if memory_of(tensor) in places and not (path == chosen.nesting and name in used)
    )


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common that are the same piece of memory in one shape."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def wrapper_of(body: Iterable[str]) -> str:
    """Return the modules that hold all of a network: ``net.`` if it only wraps another one."""
    parts = zip(*(key.split(".")[:-1] for key in body), strict=False)
    common = itertools.takewhile(lambda names: len(set(names)) == 1, parts)
    return "".join(f"{names[0]}." for names in common)


def _dotted(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


def _state_dicts(
    tree: Tree, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every dictionary that holds tensors itself, with its path, from the top down."""
    if tensors := {key: value for key, value in tree.items() if isinstance(value, Tensor)}:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _state_dicts(value, (*path, key))


def _suggested_prefixes(names: Iterable[str], wanted: Mapping[str, str]) -> list[str]:
    """Return the prefixes under which most of the wanted names stand, the best first."""
    votes: Counter[str] = Counter()
    longest = max((word.count(".") for word in wanted), default=0) + 1
    for name in names:
        parts = name.split(".")
        for i in range(max(0, len(parts) - longest), len(parts)):
            if ".".join(parts[i:]) in wanted:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    return [prefix for prefix, _ in votes.most_common(MOST_PREFIXES)] or [""]


def _spell(key: str, spelling: Mapping[str, str]) -> str:
    return ".".join(spelling.get(part, part) for part in key.split("."))


def _fits(shape: torch.Size, expected: torch.Size, any_first: bool) -> bool:
    start = 1 if any_first else 0
    return len(shape) == len(expected) and shape[start:] == expected[start:]


def _preference(candidate: _Candidate) -> tuple[int, ...]:
    words = set(re.split(r"[._]", candidate.place.lower()))
    return (
        len(candidate.foreign) > 0,
        candidate.nesting not in TAKEN_FIRST,
        len(words & TAKEN_LAST),
        -len(candidate.keys),
        len(candidate.nesting),
        candidate.prefix.count("."),
    )


def _explain(
    checkpoint: Checkpoint, nearest: _Candidate, expected: Mapping[str, torch.Size]
) -> str:
    """Return an error's text: the nearest reading, what it lacks, and what to try."""
    rows = [("network", "expects", "file")]
    for key, name in nearest.unfit.items():
        there = nearest.tensors.get(name)
        found = "absent" if there is None else printable(f"{name} {_shape(there.shape)}")
        rows.append((key, _shape(expected[key]), found))
    widths = [max(len(row[column]) for row in rows[: MOST_LINES + 1]) for column in (0, 1)]
    table = [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows[: MOST_LINES + 1]]
    if len(rows) > MOST_LINES + 1:
        table.append(f"  ... and {len(rows) - MOST_LINES - 1} more")

    used = {*nearest.keys.values(), *nearest.unfit.values()}
    extra = [f"{n} {_shape(t.shape)}" for n, t in nearest.tensors.items() if n not in used]
    if extra:
        table.append(f"The file has, unasked for: {_shortened(extra)}")
    if not nearest.absent:
        advice = (
            "The names agree, the shapes do not: the same family in another size, or with another "
            "stem or input size. Try another --arch."
        )
        if all(
            _other_channels(expected[k], nearest.tensors[n].shape) for k, n in nearest.unfit.items()
        ):
            advice += (
                " Of other channels than RGB, only a network of your own can be: path/to/file.py:"
                "function, which wraps this one and makes its images from RGB ones."
            )
    elif not nearest.keys:
        advice = "None of the network's tensors is there. Try another --arch, or --prefix."
    else:
        advice = "Try another --arch, or another part of the file by --nesting and --prefix."
    if "architecture" not in checkpoint.config and "model_type" in checkpoint.config:
        advice += (
            " Its config.json is that of a model of transformers, whose names timm does not use: "
            "wrap the model in path/to/file.py:function."
        )
    place = _quoted(nearest.nesting, nearest.prefix)
    title = (
        f"{checkpoint.path}: does not fit the network; nearest is {place}, "
        f"where {len(nearest.unfit)} tensors differ:"
    )
    return "\n".join([title, *table, advice])


def _richer(checkpoint: Checkpoint, chosen: _Candidate) -> str:
    """Return an error's text: the file holds more of a network than was asked for."""
    return (
        f"{checkpoint.path}: holds {len(chosen.foreign)} weights that the network lacks, inside "
        f"modules that it has: {_grouped(chosen.foreign, 3)}. It is a deeper or richer network of "
        "the family: try another --arch, or, if these are to be left out, say where to read by "
        f"--prefix {chosen.prefix!r}"
    )


def _other_channels(expected: torch.Size, found: torch.Size) -> bool:
    """Tell whether these are first convolutions that differ in their input channels alone."""
    return (
        len(expected) == len(found) == 4
        and expected[1] == 3 != found[1]
        and expected[:1] + expected[2:] == found[:1] + found[2:]
    )


def _at(tree: Tree, nesting: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors that stand directly in the dictionary at ``nesting``."""
    return dict(_state_dicts(tree, ()))[nesting]


def _merged(tree: Tree, nesting: tuple[str, ...], new: Tree) -> Tree:
    """Return ``tree`` with the entries at ``nesting`` replaced by ``new``, in the same order."""
    if not nesting:
        return tree | new
    inner = tree[nesting[0]]
    if not isinstance(inner, dict):
        raise KeyError(nesting[0])
    return tree | {nesting[0]: _merged(inner, nesting[1:], new)}


def _quoted(nesting: tuple[str, ...], prefix: str) -> str:
    place = repr(".".join(nesting)) if nesting else "the top of the file"
    return f"{place} with prefix {prefix!r}" if prefix else place


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "one number"


def _shortened(words: Iterable[str]) -> str:
    shown = [printable(word) for word in words]
    rest = len(shown) - MOST_LINES
    return ", ".join(shown[:MOST_LINES]) + (f", and {rest} more" if rest > 0 else "")


def _grouped(keys: Iterable[str], names: int = 2) -> str:
    """Return keys by their first two names, or more, ``module.encoder_k (122)``."""
    groups = Counter(".".join(key.split(".")[:names]) for key in keys)
    return _shortened(
        f"{group} ({count})" if count > 1 else group for group, count in groups.items()
    )
