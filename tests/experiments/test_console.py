"""A single run on a terminal shows a bar; lines are shown as they are."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from experiments import console


@pytest.mark.parametrize(
    ("process", "errors_shown", "bar"),
    [("MainProcess", True, True), ("LokyProcess-1", True, False), ("MainProcess", False, False)],
)
def test_parallel_workers_draw_no_bars(monkeypatch, process, errors_shown, bar):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: terminal)
    me = SimpleNamespace(name=process)
    monkeypatch.setattr(console.multiprocessing, "current_process", lambda: me)
    monkeypatch.setattr(console.sys, "stderr", SimpleNamespace(isatty=lambda: errors_shown))
    with console.training_bar(9, True) as advance:
        advance(4, 0.5)
    assert ("training" in terminal.file.getvalue()) == bar


def test_a_sweeps_bar_is_one_line(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: terminal)
    monkeypatch.setattr(console, "shows_bars", lambda: True)
    with console.sweep_bar() as show:
        show(12.5, 16, 2)
    told = terminal.file.getvalue()
    assert "12 of 16 runs done, 2 at work" in told
    assert told.count("\n") == 1, "only when it ends"


def test_markup_is_not_interpreted(capsys):
    console.say("run [bold]pissa[/bold]")
    assert capsys.readouterr().out == "run [bold]pissa[/bold]\n"
