"""The protocol: its arithmetic, its decisions on made-up runs, and the whole of it in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.config.protocol import ProtocolConfig
from experiments.errors import ConfigurationError
from experiments.run.files import write_json
from experiments.run.folder import RunFolder
from experiments.sweep.protocol.outcomes import Outcome
from experiments.sweep.protocol.overview import Costs, duration
from experiments.sweep.protocol.rates import choose, first_steps, next_step, rate, rate_for
from experiments.sweep.protocol.record import Record
from experiments.sweep.protocol.stages import Stages, refuse_incomplete
from experiments.sweep.protocol.trials import Entry, Trial, refuse_owned

INF = math.inf


def test_rates_are_four_a_decade():
    rates = [rate(1e-3, k, 4) for k in range(-4, 5)]
    assert rates == [1e-4, 1.78e-4, 3.16e-4, 5.62e-4, 1e-3, 1.78e-3, 3.16e-3, 5.62e-3, 1e-2]
    assert [first_steps(n) for n in (1, 4, 5)] == [[0], [-2, -1, 0, 1], [-2, -1, 0, 1, 2]]


@pytest.mark.parametrize(
    ("tried", "best", "left", "beyond"),
    [
        ([-1, 0, 1], 0, 4, None),
        ([-1, 0, 1], 1, 4, 2),
        ([0, 1, -1], -1, 4, -2),
        ([-1, 0, 1], 1, 0, None),
        ([0], 0, 1, 1),
    ],
)
def test_a_grid_goes_on_beyond_its_edge(tried, best, left, beyond):
    assert next_step(tried, best, left) == beyond


@pytest.mark.parametrize(
    ("merits", "chosen", "at_edge"),
    [
        ({1e-4: [0.5, 0.7], 1e-3: [0.7, 0.7], 1e-2: [0.6, 0.7]}, 1e-3, False),
        ({1e-4: [0.5], 1e-3: [0.7], 1e-2: [0.8]}, 1e-2, True),
        ({1e-4: [0.9, 0.9], 1e-3: [0.5, 0.5], 1e-2: [1.0, -INF]}, 1e-4, True),
        ({1e-4: [0.7], 1e-3: [0.7], 1e-2: [0.7]}, 1e-3, False),  # a plateau has no better edge
        ({1e-4: [0.7], 1e-2: [0.7]}, 1e-4, True),
    ],
)
def test_the_choice(merits, chosen, at_edge):
    choice = choose(dict(reversed(merits.items())))
    assert (choice.rate, choice.at_edge) == (chosen, at_edge)
    assert choice.merit == pytest.approx(np.mean(merits[chosen]))


def test_the_rate_of_an_equal_update():
    """Between two rates log size is linear in log rate: exact for a power law."""
    sizes = {each: 3.0 * each**0.7 for each in (1e-4, 1e-3, 1e-2)}
    target = 3.0 * 4e-4**0.7
    assert rate_for(sizes, target) == 4e-4
    assert rate_for(sizes, sizes[1e-3]) == 1e-3
    assert rate_for(sizes, 1e3) is None
    assert rate_for(sizes, 1e-9) is None
    # Far beyond the stable rates the size may fall again: the first crossing upwards counts.
    assert rate_for({1e-4: 1.0, 1e-3: 4.0, 1e-2: 2.0}, 2.0) == float(f"{10**-3.5:.3g}")
    assert rate_for({1e-4: 0.0, 1e-3: 4.0}, 2.0) is None


class MadeUpRuns:
    """Runs whose outcome is a formula of arm, rate and seed. They finish in no time, once.

    Args:
        peaks: the best rate by arm; the score falls with the square of the distance in decades.
        trouble: what happens instead, by (arm, rate, seed): "diverged" or "error".
    """

    workers = 2

    def __init__(self, outputs: Path, peaks: dict[str, float], trouble=()) -> None:
        self.outputs, self.peaks, self.trouble = outputs, peaks, dict(trouble)
        self.trained: list[tuple] = []
        self.read: list[tuple] = []

    @staticmethod
    def point(overrides) -> tuple[str, float, int]:
        values = dict(override.split("=") for override in overrides)
        arm = values.get("init") or values["control"]
        return arm, float(values["training.learning_rate"]), int(values["seed"])

    def folder(self, overrides) -> RunFolder:
        run_id = "-".join(map(str, self.point(overrides)))
        return RunFolder(run_id, self.outputs / run_id)

    def launch(self, batch) -> None:
        for overrides in batch:
            self.do(overrides)

    def do(self, overrides) -> None:
        folder, point = self.folder(overrides), self.point(overrides)
        arm, at, seed = point
        done = folder.finished()
        if done is None and point in self.trouble:
            folder.start_over()
            write_json(folder.path / "failed.json", {"reason": self.trouble[point]})
            return
        if done is None:
            self.trained.append(point)
            score = 0.9 - 0.1 * math.log10(at / self.peaks[arm]) ** 2 + 0.001 * seed
            folder.start_over()
            update = {"step": 100, "split": "update", "update_size": 7 * at / self.peaks[arm]}
            later = {"step": 400, "split": "update", "update_size": 1e3}
            metrics = f"{json.dumps(update)}\n{json.dumps(later)}\n"
            (folder.path / "metrics.jsonl").write_text(metrics)
            done = {
                "run_id": folder.id, "status": "finished", "method": arm, "tested": False,
                "validation_score": score, "validation": {"loss": 1 - score},
                "wall_seconds": 10.0, "train_seconds": 7.0, "init_seconds": 1.0,
            }  # fmt: skip
        if "read_test=true" in overrides and not done["tested"]:
            self.read.append(point)
            done = {**done, "tested": True, "test_seconds": 4.0}
        write_json(folder.result_file, done)


@pytest.fixture
def staged(tmp_path):
    def build(peaks, trouble=(), **settings):
        config = ProtocolConfig(**{"methods": list(peaks), "grid": 3, "seeds": [0, 1]} | settings)
        runs = MadeUpRuns(tmp_path / "runs", peaks, trouble)
        return Stages(config, runs, Record(tmp_path / "protocol.json", config)), runs

    return build


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "protocol.json").read_text())


def test_each_arm_finds_its_own_rate_and_only_that_is_tested(staged, tmp_path):
    stages, runs = staged({"kaiming": 1e-3, "pissa": 1e-4, "olora": 3.16e-3}, max_extensions=4)
    assert stages.run() == []
    record = written(tmp_path)
    chosen = {arm: found["learning_rate"] for arm, found in record["selected"].items()}
    assert chosen == {"kaiming": 1e-3, "pissa": 1e-4, "olora": 3.16e-3}
    assert not any(found["at_edge"] for found in record["selected"].values())
    assert sorted(runs.read) == sorted((arm, at, s) for arm, at in chosen.items() for s in (0, 1))
    assert len(set(runs.trained)) == len(runs.trained), "no run is made twice"
    # kaiming's best lies inside its grid; pissa's is three places below its edge, and one more is
    # needed to see that it falls there.
    tried = {arm: sorted({at for a, at, _ in runs.trained if a == arm}) for arm in chosen}
    assert tried["kaiming"] == [5.62e-4, 1e-3, 1.78e-3]
    assert tried["pissa"][0] == 5.62e-5
    assert tried["olora"][-1] == 5.62e-3
    names = [stage["name"] for stage in record["stages"]]
    assert names == ["grid", *(f"extension {n}" for n in (1, 2, 3, 4)), "test"]
    assert record["selected"]["pissa"]["runs"] == ["pissa-0.0001-0", "pissa-0.0001-1"]
    assert record["selected"]["pissa"]["validation_score"] == pytest.approx(0.9005)


def test_extensions_end_and_the_record_says_so(staged, tmp_path):
    stages, _ = staged({"kaiming": 1.0}, max_extensions=2)
    stages.run()
    found = written(tmp_path)["selected"]["kaiming"]
    assert (found["learning_rate"], found["at_edge"]) == (5.62e-3, True)


def test_a_seed_that_diverges_counts_as_the_worst(staged, tmp_path):
    stages, runs = staged(
        {"kaiming": 1e-3}, trouble={("kaiming", 1e-3, 1): "diverged"}, select_by="loss"
    )
    assert stages.run() == []
    assert written(tmp_path)["selected"]["kaiming"]["learning_rate"] in (5.62e-4, 1.78e-3)
    assert all(at != 1e-3 for _, at, _ in runs.read)


def test_a_broken_arm_is_left_out_and_completed_later(staged, tmp_path, capsys):
    trouble = {("pissa", 1e-3, 0): "out of memory"}
    stages, runs = staged({"kaiming": 1e-3, "pissa": 1e-3}, trouble)
    assert stages.run() == ["pissa"]
    assert list(written(tmp_path)["selected"]) == ["kaiming"]
    with pytest.raises(ConfigurationError, match="for pissa: runs are missing.*the same"):
        refuse_incomplete(["pissa"])

    again, completed = staged({"kaiming": 1e-3, "pissa": 1e-3})
    assert again.run() == []
    assert completed.trained == [("pissa", 1e-3, 0)]
    assert completed.read == [("pissa", 1e-3, 0), ("pissa", 1e-3, 1)]
    assert list(written(tmp_path)["selected"]) == ["kaiming", "pissa"]
    assert runs.read == [("kaiming", 1e-3, 0), ("kaiming", 1e-3, 1)]


def test_equal_update_size(staged, tmp_path):
    """Sizes are 7 rate / peak here: the arm whose peak is four times lower needs a rate four times
    lower."""
    stages, runs = staged(
        {"kaiming": 1e-3, "pissa": 2.5e-4}, equal_update=True, learning_rates={"pissa": 3e-4}
    )
    stages.run()
    record = written(tmp_path)
    assert record["equal_update"]["pissa"]["learning_rate"] == 2.5e-4
    assert record["equal_update"]["pissa"]["update_size"] == pytest.approx(7.0)
    assert list(record["equal_update"]) == ["pissa"]
    assert ("pissa", 2.5e-4, 1) in runs.read
    assert record["stages"][-1]["name"] == "equal update"


def test_a_dry_run_makes_nothing(staged, tmp_path, capsys):
    stages, runs = staged({"kaiming": 1e-3}, dry_run=True)
    assert stages.run() == []
    assert not runs.trained
    assert not (tmp_path / "protocol.json").exists()
    told = capsys.readouterr().out
    assert "6 runs in the first grid" in told
    assert "?" in told


def test_the_plan_tells_the_time_by_the_runs_that_are_there():
    def finished(arm, wall):
        result = {"wall_seconds": wall, "train_seconds": wall - 4, "init_seconds": 1.0}
        return Trial(Entry(arm, 8), 1e-3, 0), Outcome("finished", None, result)

    costs = Costs([finished("kaiming", 10.0), finished("kaiming", 20.0), finished("eva", 30.0)])
    missing = [Trial(Entry(arm, 8), 1e-3, 1) for arm in ("kaiming", "eva", "pissa")]
    assert costs.train(missing, 2).seconds == pytest.approx((15 + 30 + 20) / 2)
    assert costs.test(4, 2).seconds == pytest.approx(4 * 3.0 / 2)
    assert Costs([]).train(missing, 2).seconds is None
    assert [duration(s) for s in (40, 754, 12_600)] == ["40 s", "13 min", "3.5 h"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": []}, r"methods=\[\]"),
        ({"methods": ["kaiming", "pisa"]}, "methods='pisa' is not supported.*did you mean 'pissa'"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\]"),
        ({"baseline": "pissa"}, "baseline='pissa' is not supported: must be one of kaiming"),
        ({"learning_rates": {"pisa": 1e-3}}, "learning_rates='pisa'.*must be rates of kaiming"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"grid": 0}, "grid=0 is not supported: must be an integer >= 1"),
        ({"scaling": -1.0}, "scaling=-1.0"),
        ({"select_by": "test"}, "select_by='test' is not supported: must be one of score, loss"),
        ({"controls": ["kaiming"]}, "controls='kaiming'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ProtocolConfig(**settings).check()


def test_what_the_protocol_sets_is_refused_on_the_command_line():
    with pytest.raises(ConfigurationError, match=r"init=… is set by.*hydra.sweeper.methods"):
        refuse_owned(["model", "init"], ProtocolConfig())
    with pytest.raises(ConfigurationError, match="scaling=null"):
        refuse_owned(["lora.lora_alpha"], ProtocolConfig())
    refuse_owned(["lora.lora_alpha", "init.niter"], ProtocolConfig(scaling=None))


@pytest.mark.exhaustive
def test_the_whole_protocol_in_small(command, tiny, tmp_path, monkeypatch):
    overrides = [
        *(each for each in tiny if not each.startswith("lora.r=")), "training.validate_every=0",
        "hydra.sweeper.methods=[kaiming,pissa]", "hydra.sweeper.ranks=[4]", "hydra.sweeper.grid=1",
        "hydra.sweeper.seeds=[0,1]", "hydra.sweeper.max_extensions=0",
        "hydra.sweeper.equal_update=false",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, _, told = command("--config-name", "sweep_protocol", *overrides, "seed=3")
    assert status == 1
    assert "hydra.sweeper.seeds" in told
    assert "Traceback" not in told

    outputs = tmp_path / "outputs"
    for turn in range(2):
        status, printed, told = command("--config-name", "sweep_protocol", *overrides)
        assert status == 0, told
        record = json.loads((outputs / "sweeps" / "protocol" / "protocol.json").read_text())
        manifest = json.loads((outputs / "sweeps" / "protocol" / "manifest.json").read_text())
        assert [stage["name"] for stage in record["stages"]] == ["grid", "test"]
        assert (manifest["status"], manifest["total"], len(manifest["runs"])) == ("finished", 4, 4)
        results = [
            json.loads((Path(run["folder"]) / "result.json").read_text())
            for run in manifest["runs"]
        ]
        assert all(result["tested"] for result in results)
        assert all(result["config"]["lora"]["lora_alpha"] == 8 for result in results)
        assert sorted(record["selected"]["pissa"]["runs"]) == sorted(
            result["run_id"] for result in results if result["method"] == "pissa"
        )
        if turn == 0:
            assert "one run first" in printed
            first = record, results
    assert (record, results) == first
    assert printed.count("finished before, skipped") == 8
