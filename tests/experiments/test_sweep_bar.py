"""A bar over runs that work elsewhere."""

from __future__ import annotations

import contextlib
import pickle
import threading

from experiments.sweep import bar as sweep_bar
from experiments.sweep.status.survey import Line, Survey


def line(state, step=None, steps=None):
    return Line("a run", "pissa", state, step=step, steps=steps)


def test_parts_of_runs_count():
    lines = [line("finished", 9, 9), line("failed"), line("running", 30, 120), line("running")]
    lines += [line("missing"), line("died")]
    assert sweep_bar.progress_of(Survey("one", 8, lines)) == (2.25, 8, 2)
    # A sweeper that decides as it goes has no total.
    assert sweep_bar.progress_of(Survey("one", None, lines)) == (2.25, 6, 2)


def test_it_follows_until_the_sweep_ends(tmp_path, monkeypatch):
    """A look that fails, since somebody writes at that moment, is not the last."""
    looks, shown, ended = iter([OSError, 1, 2, ValueError, 3]), [], threading.Event()

    def look(folder):
        found = next(looks, None)
        if found is None:
            ended.set()
            raise OSError
        if isinstance(found, type):
            raise found
        return Survey("one", 3, [line("finished")] * found)

    @contextlib.contextmanager
    def bar():
        yield lambda *numbers: shown.append(numbers)

    monkeypatch.setattr(sweep_bar, "survey", look)
    monkeypatch.setattr(sweep_bar, "sweep_bar", bar)
    monkeypatch.setattr(sweep_bar, "INTERVAL", 0.0)
    monkeypatch.setattr(sweep_bar, "SHARE", 1e9)
    sweep_bar.follow(tmp_path, ended)
    assert shown == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]


def test_it_goes_to_workers_without_its_thread():
    """Hydra sends every callback along with each job."""
    bar = sweep_bar.SweepBar()
    bar.thread = threading.Thread(target=print)
    sent = pickle.loads(pickle.dumps(bar))
    assert sent.thread is None
    sent.end()
