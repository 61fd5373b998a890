import pytest

from unbackdoor.progress import display


@pytest.mark.parametrize("what", ["defend my{x}.py:f", "defend a[/b].py:f", "defend [old]/f.py"])
def test_what_is_run_is_shown_as_it_is_called(what, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "120")
    with display(what) as shown:
        shown.on_step(1, 2)
    assert what in capsys.readouterr().out


def test_what_is_said_steers_no_terminal(capsys):
    with display("purify") as shown:
        shown.say("a\x1b]0;x\x07\nb [red]")
    assert capsys.readouterr().out == "a?]0;x?\nb [red]\n"
