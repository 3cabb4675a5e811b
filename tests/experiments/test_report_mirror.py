"""The report in an offline run of the real wandb."""

import sys
import time

import pytest
from synthetic_sweeps import no_charts, write_run

from experiments.errors import ConfigurationError
from experiments.report import output
from experiments.report.__main__ import main, make
from experiments.report.mirror import log_to_wandb


def write_two(folder):
    for method in ("kaiming", "pissa"):
        write_run(folder / f"{method}-0", method, 0, blocks=1, steps=20)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_pictures_table_and_page_arrive_in_the_sweeps_group(tmp_path, monkeypatch, capsys):
    import wandb

    write_two(tmp_path / "two")
    drawn, begun = [], {}
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **kw: (begun.update(kw), init(**kw))[1])
    original = output.write_pictures

    def first_only(chart, *given):
        drawn.append(chart.name)
        return original(chart, *given) if len(drawn) == 1 else []

    monkeypatch.setattr(output, "write_pictures", first_only)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main([str(tmp_path / "two"), "--wandb", "mine"]) == 0
    assert "upload with `wandb sync`" in capsys.readouterr().out
    assert wandb.run is None, "closed"
    (folder,) = (tmp_path / "two" / "report" / "wandb").glob("offline-run-*")
    media = folder / "files" / "media"
    assert [path.name.split("_")[0] for path in media.glob("images/charts/*.png")] == drawn[:1]
    assert len(list(media.glob("table/*.json"))) == len(list(media.glob("html/*.html"))) == 1
    (log,) = folder.glob("*.wandb")
    ends = time.monotonic() + 30
    while b"mine" not in log.read_bytes() and time.monotonic() < ends:
        time.sleep(0.1)  # a service that runs already writes after `finish` has returned
    assert b"mine" in log.read_bytes()
    assert (begun["group"], begun["job_type"], begun["mode"]) == ("two", "report", "offline")


def test_a_missing_wandb_is_named(tmp_path, monkeypatch):
    write_two(tmp_path / "two")
    monkeypatch.setattr(output, "draw", no_charts)
    report = make([tmp_path / "two"], tmp_path / "report")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigurationError, match="pip install wandb"):
        log_to_wandb(report)
