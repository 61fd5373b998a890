import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from unbackdoor.defenses.settings import AdversarialSettings, BcuSettings, FineTuningSettings
from unbackdoor.errors import SettingsError
from unbackdoor.settings import PurifySettings
from unbackdoor.values import changed, flatten, made, nested, settings_from


@dataclass(frozen=True)
class Inner:
    """Settings that are only right together."""

    first: float = 0.5
    second: float = 0.5

    def __post_init__(self):
        if self.first + self.second != 1:
            raise SettingsError("inner.first and inner.second do not add up to 1")


@dataclass(frozen=True)
class Odd:
    """Every kind of value that can be read, and one that cannot."""

    maybe: float | None = None
    factor: float = 1
    count: int = 1
    word: str = "x"
    on: bool = False
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[float, ...] = ()
    either: int | str = 1
    number: int | float = 1
    mode: Literal[1, 2] = 1
    labels: Literal["given", "none"] | None = None
    modes: tuple[Literal["a", "b"], ...] = ()
    table: dict[str, Any] = field(default_factory=dict)
    odd: set[int] = field(default_factory=set)
    inner: Inner = Inner()


@dataclass(frozen=True)
class Needed:
    """Fields without defaults, one of them a dataclass."""

    inner: Inner
    count: int
    inners: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("native", "text", "value"),
    [
        ({"maybe": 0.5}, {"maybe": ".5"}, {"maybe": 0.5}),
        ({"maybe": "none"}, {"maybe": "none"}, {"maybe": None}),
        ({"factor": 2}, {"factor": "2"}, {"factor": 2.0}),
        ({"factor": "1/4"}, {"factor": "1/4"}, {"factor": 0.25}),
        ({"count": 3}, {"count": "3"}, {"count": 3}),
        ({"word": "none"}, {"word": "none"}, {"word": "none"}),
        ({"on": True}, {"on": "True"}, {"on": True}),
        ({"pair": [3, "1/2"]}, {"pair": "3,1/2"}, {"pair": (3, 0.5)}),
        ({"many": [1, 2, 3]}, {"many": "1,2,3"}, {"many": (1.0, 2.0, 3.0)}),
        ({"either": "x"}, {"either": "x"}, {"either": "x"}),
        ({"either": 3}, {"either": "3"}, {"either": 3}),
        ({"number": 2.5}, {"number": "2.5"}, {"number": 2.5}),
        ({"number": 2}, {"number": "2"}, {"number": 2}),
        ({"mode": 2}, {"mode": "2"}, {"mode": 2}),
        ({"labels": "none"}, {"labels": "none"}, {"labels": "none"}),
        ({"modes": ["a", "b"]}, {"modes": "a,b"}, {"modes": ("a", "b")}),
    ],
)
def test_a_value_is_read_as_its_type_and_not_as_its_default(native, text, value):
    ((name, expected),) = value.items()
    start = Odd(maybe=7.0)
    for read in (changed(start, native, "here"), changed(start, text, "here", texts=True)):
        assert read == Odd(**{"maybe": 7.0, **value})
        assert type(getattr(read, name)) is type(expected)
    assert [type(part) for part in changed(start, {"pair": [3, 1]}, "here").pair] == [int, float]


@pytest.mark.parametrize(
    ("table", "texts", "message"),
    [
        ({"maybe": "x"}, False, "maybe is a number or a ratio, got 'x'"),
        ({"maybe": "1/0"}, True, "maybe is a number or a ratio, got '1/0'"),
        ({"factor": True}, False, "factor is a number or a ratio, got True"),
        ({"factor": "none"}, False, "factor is a number or a ratio, got 'none'"),
        ({"factor": math.inf}, False, "factor is a number or a ratio, got inf"),
        ({"maybe": math.nan}, False, "maybe is a number or a ratio, got nan"),
        ({"count": 0.5}, False, "count is a whole number, got 0.5"),
        ({"count": "3"}, False, "count is a whole number, got '3'"),
        ({"count": True}, False, "count is a whole number, got True"),
        ({"count": "2.5"}, True, "count is a whole number, got '2.5'"),
        ({"word": 3}, False, "word is a text, got 3"),
        ({"on": 1}, False, "on is true or false, got 1"),
        ({"on": "yes"}, True, "on is true or false, got 'yes'"),
        ({"pair": [3]}, False, r"pair is a list of 2, got \[3\]"),
        ({"pair": "3"}, True, r"pair is a list of 2, got \['3'\]"),
        ({"pair": "3,1"}, False, "pair is a list, got '3,1'"),
        ({"pair": [0.5, 1]}, False, r"pair\[0\] is a whole number, got 0.5"),
        ({"either": 0.5}, False, "either is a whole number, got 0.5"),
        ({"number": "x"}, True, "number is of another kind, got 'x'"),
        ({"factor": 10**400}, False, "factor is a number or a ratio, got 1000"),
        ({"mode": "2"}, False, "mode is one of 1, 2, got '2'"),
        ({"table": {"a": "1"}}, True, "table is a table, which no text can be"),
        ({"mode": 3}, False, "mode 3 is unknown; there are 1, 2"),
        ({"mode": 2}, True, "mode is one of 1, 2, got 2"),
        ({"mode": [1]}, False, r"mode \[1\] is unknown"),
        ({"table": 3}, False, "table is a table, got 3"),
        ({"odd": "1"}, True, "odd is of type set, got '1'"),
        ({"coutn": 3}, False, "setting 'coutn' is unknown; did you mean 'count'"),
        ({"inner": 3}, False, "inner is a table of settings, got 3"),
        ({"inner": {"frist": 1}}, False, "'inner.frist' is unknown; did you mean 'inner.first'"),
        ({"inner": {"first": "x"}}, True, "inner.first is a number or a ratio, got 'x'"),
        ({"inner": {"first": 0.25}}, False, "inner.first and inner.second do not add up to 1"),
    ],
)
def test_what_a_value_should_have_been_is_told(table, texts, message):
    with pytest.raises(SettingsError, match=f"^here: .*{message}"):
        changed(Odd(), table, "here", texts=texts)


def test_a_table_is_taken_as_it_is_and_none_in_any_case():
    assert changed(Odd(), {"table": {"a": 1}}, "here").table == {"a": 1}
    assert changed(Odd(maybe=1.0), {"maybe": "None"}, "here", texts=True).maybe is None


def test_values_are_put_in_all_at_once():
    table = {"count": 2, "inner": {"first": 0.25, "second": 0.75}}
    assert changed(Odd(), table, "here") == Odd(count=2, inner=Inner(0.25, 0.75))


def test_a_prefix_stands_before_every_name():
    with pytest.raises(SettingsError, match=r"here: a\.count is a whole number"):
        changed(Odd(), {"count": 0.5}, "here", prefix="a.")


def test_dotted_names_and_nested_tables_are_two_ways_to_write_one_thing():
    leaves = [("a", 1), ("b.c", 2), ("b.d.e", 3), ("b.d.f", 4)]
    table = {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}}
    assert nested(leaves) == table
    assert flatten(table) == leaves


def test_a_dataclass_is_made_of_a_table_and_of_parts_that_are_ready():
    inner = Inner(0.25, 0.75)
    table = {"inner": inner, "count": 3, "inners": (inner, inner)}
    assert made(Needed, table, "here") == Needed(inner, 3, (inner, inner))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "lacks count, inner"),
        ({"inner": Inner(), "count": 1, "conut": 1}, "key 'conut' is unknown; did you mean 'cou"),
        ({"inner": Inner(), "count": 0.5}, "count is a whole number, got 0.5"),
        ({"inner": 3, "count": 1}, "inner is of type Inner, got 3"),
    ],
)
def test_a_dataclass_is_not_made_of_something_else(table, message):
    with pytest.raises(SettingsError, match=f"^here: {message}"):
        made(Needed, table, "here")


def test_settings_are_read_as_what_they_are():
    changed = settings_from(FineTuningSettings(), ["tuning.learning-rate=1/50", "seed=3"])
    assert (changed.tuning.learning_rate, changed.seed) == (0.02, 3)
    assert changed.tuning.epochs == 10
    shares = settings_from(BcuSettings(), ["shares=0,0,0,0,0,1/2"]).shares
    assert shares == (0, 0, 0, 0, 0, 0.5)
    assert settings_from(AdversarialSettings(), ["epsilon=8/255"]).epsilon == 8 / 255
    together = settings_from(PurifySettings(), ["pull=.5", "distill=.25", "align=.25"])
    assert (together.pull, together.distill, together.align) == (0.5, 0.25, 0.25)
