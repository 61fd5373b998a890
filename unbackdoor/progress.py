"""What a long command shows: a bar with the time left on a terminal, lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unbackdoor.errors import printable_lines


class Display(NamedTuple):
    """Where a long command reports to."""

    say: Callable[[str], None]  # one line
    on_step: Callable[[int, int], None]  # steps done, steps in all


@contextmanager
def display(what: str, *, quiet: bool = False) -> Iterator[Display]:
    """Show how far ``what`` has come while inside; the bar appears with the first step.

    Args:
        quiet: Show nothing: another process does.
    """
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
    named = TextColumn("{task.description}", markup=False)
    columns = (named, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def on_step(done: int, steps: int) -> None:
            bar.update(task, completed=done, total=steps, visible=True)

        yield Display(lambda text: console.print(printable_lines(text)), on_step)
