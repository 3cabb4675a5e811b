"""Reading synthetic sweeps, intact and damaged. All numbers are made up."""

import json
import re
import shutil

import pytest
from synthetic_sweeps import STEPS, no_charts, write_protocol, write_run, write_sweep

from experiments.report import archive, output
from experiments.report.__main__ import make
from experiments.report.archive import gather
from experiments.report.arms import differences, with_arms
from experiments.report.checks import choice_warnings
from experiments.report.choices import PROTOCOL, TEST, VALIDATION, choose
from experiments.report.sweeps import load_sweeps


@pytest.fixture
def read(tmp_path_factory):
    """`read(folder, …)` gathers without a cache of earlier calls."""

    def read(*folders, cache=None):
        cache = cache or tmp_path_factory.mktemp("cache")
        return gather(load_sweeps(folders), cache, lambda step: None)

    return read


def test_settings_other_than_rate_and_task_make_an_arm(tmp_path, read):
    for rate in (1e-3, 2e-3):
        write_run(tmp_path / f"pissa-{rate}", "pissa", 0, learning_rate=rate)
    write_run(tmp_path / "pissa-16", "pissa", 0, learning_rate=1e-3, rank=16)
    write_run(tmp_path / "kaiming", "kaiming", 0, options={"note": 1})
    write_run(tmp_path / "kaiming2", "kaiming", 1, options={"note": 2})
    runs = with_arms(read(tmp_path).runs).set_index("run_id")
    assert runs["arm"].to_dict() == {
        "pissa-0.001": "pissa · r=8", "pissa-0.002": "pissa · r=8", "pissa-16": "pissa · r=16",
        "kaiming": "kaiming · r=8, note=1", "kaiming2": "kaiming · r=8, note=2",
    }  # fmt: skip
    found = differences(runs.reset_index())
    assert found["training.learning_rate"] == [1e-3, 2e-3]
    assert found["lora.r"] == [8, 16]


def test_settings_that_every_method_was_tried_at_are_no_difference(tmp_path, read):
    for method in ("kaiming", "pissa"):
        for rank in (8, 16):
            for rate in (1e-3, 2e-3) if method == "pissa" else (3e-3, 6e-3):
                folder = tmp_path / f"{method}-{rank}-{rate}"
                write_run(folder, method, 0, rank=rank, learning_rate=rate)
    assert differences(read(tmp_path).runs) == {}
    write_run(tmp_path / "pissa-more", "pissa", 0, rank=16, learning_rate=1e-3, steps=60)
    assert set(differences(read(tmp_path).runs)) == {"training.steps"}
    write_run(tmp_path / "control", "pissa", 0, control="matched_norm", examples=50)
    assert set(differences(read(tmp_path).runs)) == {"training.steps"}, "controls may differ"


def test_a_sweep_names_what_failed_and_what_never_started(tmp_path, monkeypatch, read):
    sweep = write_sweep(tmp_path)
    path = sweep / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["total"] = len(manifest["runs"]) + 4
    manifest["runs"].append({"folder": None, "overrides": ["init=typo"], "status": "failed"})
    path.write_text(json.dumps(manifest))
    (tmp_path / "runs" / "pissa-7").mkdir()
    recorded = {"run_id": "7", "reason": "diverged", "error": "RunFailed", "message": "loss is nan"}
    (tmp_path / "runs" / "pissa-7" / "failed.json").write_text(json.dumps(recorded))
    monkeypatch.chdir("/")  # run folders are found from anywhere
    found = read(sweep)
    assert len(found.runs) == 16
    assert {problem.run: problem.reason for problem in found.problems} == {
        "sweep synthetic": "3 of its 22 runs never started",
        "init=pissa seed=7 (runs/pissa-7)":
            "the sweep marked it 'failed': diverged: RunFailed: loss is nan",
        "init=eva seed=8 (runs/lost)": "its folder '/runs/lost' does not exist",
        "init=typo": "the sweep marked it 'failed'",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": [1]}', "{}"])
def test_a_broken_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="is not a manifest"):
        load_sweeps([tmp_path])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "result.json").write_text("{"), "Expecting property name"),
        (lambda run: (run / "result.json").write_text('{"run_id": "x"}'), "lacks method, seed"),
        (lambda run: (run / "init.json").write_text("[]"), "init.json cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text('{\n{"a": 1}\n'), "metrics.jsonl cannot"),
        (lambda run: (run / "end.json").write_text("{"), "end.json cannot be read"),
    ],
)  # fmt: skip
def test_each_damaged_file_is_reported(tmp_path, read, damage, message):
    for method in ("kaiming", "eva"):
        write_run(tmp_path / "runs" / f"{method}-0", method, 0)
    damage(tmp_path / "runs" / "kaiming-0")
    for _ in range(2):  # and again from the cache
        found = read(tmp_path / "runs", cache=tmp_path / "cache")
        (problem,) = found.problems
        assert message in problem.reason
        assert "kaiming" in problem.run
        assert len(found.runs) == (1 if problem.fatal else 2)


def test_a_cut_last_line_and_a_repeated_run_are_fine(tmp_path, read):
    write_run(tmp_path / "eva-0", "eva", 0)
    with (tmp_path / "eva-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12')
    found = read(tmp_path, tmp_path / "eva-0")
    assert len(found.runs) == 1
    assert not found.problems
    assert len(found.metrics) == STEPS + 1


def test_the_same_run_in_two_places_is_read_once_and_named(tmp_path, read):
    write_run(tmp_path / "here" / "eva-0", "eva", 0)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    found = read(tmp_path / "here", tmp_path / "there")
    assert len(found.runs) == 1
    assert "the same run as" in found.problems[0].reason


def test_only_what_changed_is_read_again(tmp_path, read, monkeypatch):
    """With a new run, a missing and a repeated one, the tables equal those of a first report."""
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    for seed in range(4):
        write_run(runs / f"eva-{seed}", "eva", seed)
    assert read(runs, cache=cache).reused == 0
    seen = []
    original = archive.read_run
    monkeypatch.setattr(
        archive, "read_run", lambda folder: (seen.append(folder.name), original(folder))[1]
    )
    assert read(runs, cache=cache).reused == 4
    assert seen == []
    shutil.rmtree(runs / "eva-0")
    shutil.rmtree(runs / "eva-1")
    write_run(runs / "eva-1", "eva", 1, steps=60)
    write_run(runs / "pissa-0", "pissa", 0, ended=True)
    found = read(runs, cache=cache)
    assert (found.reused, seen) == (2, ["eva-1", "pissa-0"])
    fresh = read(runs)
    for name, order in (("runs", []), ("layers", ["name"]), ("metrics", ["split", "step"])):
        ours, theirs = (getattr(x, name).sort_values(["run_id", *order]) for x in (found, fresh))
        columns = [column for column in theirs if column != "gaps"]
        assert len(ours) == len(theirs)
        for column in columns:
            assert ours[column].isna().tolist() == theirs[column].isna().tolist()
            assert ours[column].dropna().tolist() == theirs[column].dropna().tolist()
    assert len(found.metrics) == 2 * (STEPS + 1) + 61 + STEPS + 3


def test_tables_of_another_format_or_damaged_ones_are_rebuilt(tmp_path, read, monkeypatch):
    write_run(tmp_path / "runs" / "eva-0", "eva", 0)
    cache = tmp_path / "cache"
    read(tmp_path / "runs", cache=cache)
    (cache / "layers.parquet").write_bytes(b"PAR1")
    assert read(tmp_path / "runs", cache=cache).reused == 0
    assert read(tmp_path / "runs", cache=cache).reused == 1
    monkeypatch.setattr(archive, "FORMAT", "another")
    assert read(tmp_path / "runs", cache=cache).reused == 0


def test_layers_have_their_start_and_their_end(tmp_path, read):
    write_run(tmp_path / "eva-0", "eva", 0, ended=True)
    layers = read(tmp_path).layers
    ends = json.loads((tmp_path / "eva-0" / "end.json").read_text())["layers"]
    assert layers["angle_B"].tolist() == [layer["angle_B"] for layer in ends]
    assert layers["captured_energy"].notna().all()


def test_the_rate_is_chosen_on_validation_among_rates_that_all_seeds_finished(tmp_path, read):
    scores = {1e-4: (0.70, 0.72), 1e-3: (0.75, 0.73), 1e-2: (0.99,)}  # at 1e-2 a seed diverged
    for rate, values in scores.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"pissa-{rate}-{seed}"
            write_run(folder, "pissa", seed, learning_rate=rate, validated=True)
            path = folder / "result.json"
            result = json.loads(path.read_text()) | {"validation_score": value}
            path.write_text(json.dumps(result | {"score": 1 - value}))
    (choice,) = choose(with_arms(read(tmp_path).runs), {})
    assert (choice.learning_rate, choice.by, choice.rates) == (1e-3, VALIDATION, 3)
    assert choice.runs == ("pissa-0.001-0", "pissa-0.001-1")
    assert not choice.at_edge
    for path in tmp_path.glob("*/result.json"):
        result = json.loads(path.read_text())
        del result["validation_score"]
        path.write_text(json.dumps(result))
    (choice,) = choose(with_arms(read(tmp_path).runs), {})
    assert (choice.learning_rate, choice.by, choice.at_edge) == (1e-4, TEST, True)


def test_a_protocol_chooses_and_its_control_is_an_arm(tmp_path, read):
    rates = [3e-4, 1e-3, 3e-3]
    sweep = write_protocol(tmp_path, methods=("kaiming", "pissa"), rates=rates, seeds=(0, 1),
                           blocks=1, steps=20, control=("pissa", "matched_norm"))  # fmt: skip
    listed = load_sweeps([sweep])
    choices = choose(with_arms(read(sweep).runs), listed.selected)
    assert [choice.arm for choice in choices] == ["kaiming", "pissa", "pissa (matched norm)"]
    assert {choice.by for choice in choices} == {PROTOCOL}
    assert choices[2].is_control
    assert choices[2].runs == ("control-0", "control-1")
    recorded = json.loads((sweep / "protocol.json").read_text())["selected"]
    assert choices[1].learning_rate == recorded["pissa-r8"]["learning_rate"]
    assert list(choices[1].runs) == recorded["pissa-r8"]["runs"]
    partly = {arm: one for arm, one in listed.selected.items() if one["method"] != "pissa"}
    runs = with_arms(read(sweep).runs)
    (only,) = choose(runs, partly)
    assert only.arm == "kaiming"
    (warning,) = choice_warnings(runs, [only])[:1]
    assert "has not chosen a setting for pissa, pissa (matched norm)" in warning
    (sweep / "protocol.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a protocol"):
        load_sweeps([sweep])


def test_equal_update_size_is_a_separate_table(tmp_path, monkeypatch):
    """Its rate is not in the grid, and its runs do not affect the choice."""
    monkeypatch.setattr(output, "draw", no_charts)
    sweep = write_protocol(tmp_path, methods=("kaiming", "pissa", "eva"), rates=[1e-3, 3e-3],
                           seeds=(0, 1), blocks=1, steps=20, matched="pissa")  # fmt: skip
    report = make([sweep], tmp_path / "report")
    assert {row.choice.rates for row in report.rows} == {2}
    html = report.page.read_text()
    table = html.split('id="equal"')[1].split("</table>")[0]
    assert re.findall(r'<tr data-method="(\w+)"', table) == ["kaiming", "pissa"]
    assert "5e-4" in table
    matched = [json.loads((tmp_path / "runs" / f"matched-{seed}" / "result.json").read_text())
               for seed in (0, 1)]  # fmt: skip
    mean = 50 * sum(result["score"] for result in matched)
    assert f"| pissa | {mean:.1f} ±" in (tmp_path / "report" / "equal_update.md").read_text()


def test_equal_scores_choose_nothing(tmp_path, read):
    for method in ("kaiming", "pissa"):
        for rate in (1e-3, 2e-3):
            write_run(tmp_path / f"{method}-{rate}", method, 0, learning_rate=rate)
    runs = with_arms(read(tmp_path).runs).assign(task="one")
    assert all(choice.at_edge for choice in choose(runs, {}))
    runs = runs.assign(score=0.0, validation_score=0.0)
    assert not any(choice.at_edge for choice in choose(runs, {}))
