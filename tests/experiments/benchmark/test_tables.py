"""Rows as tables, charts, files and lines on a terminal."""

import io
import json

import pytest
from rich.console import Console

from experiments.benchmark import commentary, initialization, memory, summary, ticker
from experiments.benchmark.__main__ import benchmark
from experiments.benchmark.chart import charts
from experiments.benchmark.clock import Clock
from experiments.benchmark.report import Ledger, environment, machine
from experiments.benchmark.rows import Quality, Row
from experiments.benchmark.tables import amount, columns, markdown_table, terminal_table
from experiments.report.statistics import Interval

ROWS = [
    Row(
        "steps", "minilm", "LoRA", "s", ours=0.2, peft=0.3, ratio=Interval(1.5, 1.4, 1.6),
        target=0.97, verdict="met", figures={"loss difference": 2e-7},
    ),
    Row("steps", "minilm", "DoRA", "s", note="skipped: not served"),
    Row(
        "memory", "minilm", "pissa", "MiB", ours=7.5, peft=10.0,
        ratio=Interval(4 / 3, 4 / 3, 4 / 3), verdict="met", figures={"promised, MiB": 9.3},
    ),
    Row(
        "initialization", "square (synthetic), r 16", "pissa", "s", ours=0.5, peft=10.0, exact=9.0,
        ratio=Interval(20.0, 20.0, 20.0), target=15, verdict="met",
        quality={"excess": Quality(2e-5, 0.0, 1e-4)}, figures={"floor, s": 0.1, "floors": 5.0},
    ),
    Row(
        "initialization", "square (synthetic), r 16", "eva", "s", ours=0.5, exact=0.4,
        ratio=Interval(0.8, 0.7, 0.9), peer="torch.linalg", note="PEFT: no end within 20 s",
    ),
    Row(
        "initialization", "square (synthetic), r 16", "eva / plain passes", "×", ours=0.2,
        ceiling=0.3, verdict="met",
    ),
]  # fmt: skip


def test_tables():
    assert markdown_table(ROWS[:2]).splitlines() == [
        "| model | case | ours | PEFT | ratio PEFT / ours | target | loss difference | note |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | :--- |",
        "| minilm | LoRA | 200 ms | 300 ms | 1.50 [1.40, 1.60] | ≥ 0.97: met | 2.0e-07 |  |",
        "| minilm | DoRA | – | – | – | – | – | skipped: not served |",
    ]
    assert "| 7.5 MiB | 10.0 MiB | 1.33 | met | 9.3 MiB |" in markdown_table(ROWS[2:3])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(ROWS[:2]))
    told = console.export_text()
    assert "1.50 [1.40, 1.60]" in told
    assert "minilm DoRA: skipped: not served" in told


def test_a_narrow_terminal_gets_whole_cells_of_fewer_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(ROWS[3:], {}, width=80))
    told = console.export_text()
    line = next(line for line in told.splitlines() if "pissa" in line)
    assert [text in line for text in ("500 ms", "10.00 s", "20", "≥ 15: met")] == [True] * 4
    assert "excess" not in told
    assert "no room here for quality, torch.linalg: see table.md" in told
    assert "no room" not in str(terminal_table(ROWS[3:], {}).renderables[-1])


def test_the_initialization_table():
    table = markdown_table(ROWS[3:], initialization.EXTRA)
    first, eva, share = table.splitlines()[2:]
    assert "| 500 ms | 10.00 s | 9.00 s | 20 | ≥ 15: met |" in first
    assert "| excess 2.0e-05 ≤ 1.0e-04 (PEFT 0.0e+00) |" in first
    assert "| 0.80 [0.70, 0.90] (torch.linalg) |" in eva
    assert "| 0.20× | – | – | – | ≤ 0.3: met |" in share
    assert "ratio peer / ours" in columns(ROWS[3:], {})
    assert "floors" not in columns(ROWS[3:], {})


def test_report(settings):
    ledger = Ledger(settings)
    output = ledger.output
    for row in ROWS:
        ledger.hear(row)
    ledger.finish()
    result = json.loads((output / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["rows"][0]["ratio"] == {"estimate": 1.5, "low": 1.4, "high": 1.6}
    assert result["environment"]["packages"]["peft"]
    assert "**memory**: peak memory" in (output / "table.md").read_text()
    assert (output / "ratios.svg").read_text().startswith("<svg")
    assert len((output / "ratios.png").read_bytes()) > 8000
    page = (output / "ratios.html").read_text()
    assert 'src="http' not in page
    assert "steps · minilm · LoRA" in page
    page = (output / "initialization.html").read_text()
    assert "square (synthetic), r 16" in page
    assert len((output / "initialization.png").read_bytes()) > 8000
    assert charts(ROWS[1:2]) == {}


def test_what_is_broken_off_leaves_its_rows(settings, monkeypatch):
    """Tables, charts and rows of what was measured; no result, which says that all is there."""
    calls = []

    def run(settings, hear, clock):
        calls.append(clock.seconds)
        for row in ROWS:
            hear(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ROWS

    settings.sections, settings.seconds = ["memory"], 60.0
    monkeypatch.setattr(memory, "run", run)
    output = benchmark(settings)
    assert (output / "result.json").exists()
    assert not (output / "unfinished.json").exists()
    (output / "initialization.svg").unlink()
    with pytest.raises(KeyboardInterrupt):
        benchmark(settings)
    assert calls == [60.0, 60.0]
    assert not (output / "result.json").exists()
    left = json.loads((output / "unfinished.json").read_text())
    assert left["status"] == "unfinished"
    assert [row["case"] for row in left["rows"]] == [row.case for row in ROWS]
    assert (output / "table.md").read_text().startswith("**Unfinished**")
    assert (output / "initialization.svg").exists()


def test_the_summary_fits_a_readme():
    more = [
        Row(
            "initialization", "minilm, r 8", "pissa", "s", ours=0.5, peft=0.6,
            ratio=Interval(1.2, 1.1, 1.3), target=4, verdict="missed",
            quality={"excess": Quality(3e-4, 0.0, 1e-4)},
        ),
        Row(
            "initialization", "minilm, r 8", "loftq", "s", ours=0.5, note="PEFT: fails",
            quality={"overlap": Quality(0.9995, None, 0.999, least=True)},
        ),
    ]  # fmt: skip
    lines = summary.summary([*ROWS, *more], "a machine").splitlines()
    assert lines[0] == "| strategy | square, r 16 | minilm, r 8 | quality |"
    assert lines[2] == "| pissa | 20 (≥ 15) | **1.20** (≥ 4) | **excess 3.0e-04** (≤ 1.0e-04) |"
    assert lines[3] == "| eva | 0.80ᵗ | – | – |"
    assert lines[4] == "| eva / plain passes | 0.20× (≤ 0.3) | – | – |"
    assert lines[5] == "| loftq | – | 500 ms | overlap 0.9995 (≥ 0.999) |"
    assert "| steps: LoRA | minilm | 200 ms | 300 ms | 1.50 (≥ 0.97) | met |" in lines
    assert lines[-1].endswith("Measured on a machine.")
    assert len(lines) <= 40


def test_a_row_in_a_line():
    told = " ".join(commentary.line(ROWS[3]).split())
    assert told == (
        "pissa ours 500 ms, PEFT 10.00 s, torch.linalg 9.00 s; PEFT / ours 20; ≥ 15: met; "
        "excess 2.0e-05 ≤ 1.0e-04 (PEFT 0.0e+00)"
    )


def test_what_is_at_hand_is_shown_on_a_terminal(monkeypatch):
    console = Console(width=120, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(ticker.rich, "get_console", lambda: console)
    with ticker.Ticker("loading", Clock(125.0)) as shown:
        shown.total(14)
        shown.show("square: r 16 pissa, PEFT, turn 2")
        shown.advance()
    told = console.file.getvalue()
    assert "square: r 16 pissa, PEFT, turn 2" in told
    assert "1/14" in told
    assert "at most 2:0" in told
    assert ticker.time_left(Clock()) == ""


def test_a_folder_a_machine(settings):
    known = environment(settings) | {"gpu": "NVIDIA X 1", "device": "cuda"}
    assert machine(known) == "nvidia-x-1"
    assert machine(known | {"device": "cpu", "threads": 3}).endswith("3-threads")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (1.0, "1.00 s"),
        (61.5, "61.50 s"),
    ],
)
def test_times(seconds, expected):
    assert amount(seconds, "s") == expected
