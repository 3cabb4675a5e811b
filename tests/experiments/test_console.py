"""Bars are for one run on a terminal of its own; lines are shown as they are."""

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


def test_markup_is_not_interpreted(capsys):
    console.say("run [bold]pissa[/bold]")
    assert capsys.readouterr().out == "run [bold]pissa[/bold]\n"
