"""Folders of runs as the training application leaves them. All of their numbers are made up."""

import json
import math

import numpy as np

from experiments.report.gallery import make_canvas

# score, init seconds, ‖sBA‖/‖W‖, first gradient norm, output gap, log10 of the best learning rate:
# made up, and of plausible size.
SYNTHETIC = {
    "kaiming": (0.762, 0.02, 0.0, 0.9, 0.0, -2.5),
    "gaussian": (0.758, 0.02, 0.0, 0.5, 0.0, -2.5),
    "orthogonal": (0.764, 0.05, 0.0, 1.6, 2e-7, -2.75),
    "olora": (0.731, 0.09, 0.31, 9.5, 3.1e-6, -4.0),
    "pissa": (0.772, 0.6, 0.34, 4.2, 2.4e-6, -3.5),
    "corda": (0.769, 7.5, 0.28, 3.7, 2.9e-6, -3.25),
    "loftq": (0.755, 2.8, 0.04, 1.9, 0.21, -2.75),
    "eva": (0.775, 6.1, 0.0, 2.3, 0.0, -2.75),
}
SUBTRACTING = {"olora", "pissa", "corda"}
BLOCKS = {"attention.self.query": (384, 384), "attention.self.key": (384, 384),
          "attention.self.value": (384, 384), "attention.output.dense": (384, 384),
          "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}  # fmt: skip
EXAMPLES, STEPS = 1200, 120


def no_charts(summarizer, views, majority, metric, diverged):
    """In place of `gallery.draw`, half of a report's time: for tests that look at no chart."""
    return [], make_canvas(summarizer, views, metric)


def write_run(
    folder, method, seed, *, learning_rate=1e-3, rank=8, options=None, examples=EXAMPLES,
    steps=STEPS, blocks=6, tested=True, validated=False, ended=False, control="none",
    data="rotten_tomatoes", bonus=0.0, commit="0" * 40,
):  # fmt: skip
    """One finished run.

    Args:
        tested: whether the test set was read; if not, the run has a validation score only.
        ended: whether the measurements at the end were taken (end.json, spectra.json, …).
        bonus: added to the method's score.
    """
    generator = np.random.default_rng([seed, sum(method.encode()), round(1e7 * learning_rate)])
    score, init_seconds, relative_norm, gradient, gap, best = SYNTHETIC[method]
    miss = (math.log10(learning_rate) - best) ** 2
    score += bonus + 0.004 * math.log2(rank / 8) - min(0.03 * (max(miss, 2.3) - 2.3), 0.3)
    if tested:
        hardness = np.random.default_rng(7).random(examples)  # shared: some are hard for all
        level = generator.normal(score - 0.5, 0.12, examples)
        correct = level > (hardness - 0.5) * 1.05
        share = float(correct.mean())
    folder.mkdir(parents=True)
    if tested:
        np.savez(folder / "predictions.npz", id=np.arange(examples)[::-1], correct=correct[::-1])
    environment = {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux x86_64",
                   "cpu_count": 2, "git_commit": commit}  # fmt: skip
    config = {
        "init": {"name": method, **(options or {})},
        "model": {"name": "all-MiniLM-L6-v2"},
        "data": {"name": data},
        "lora": {"r": rank, "lora_alpha": 2 * rank},
        "training": {"steps": steps, "learning_rate": learning_rate},
        "seed": seed,
        "control": control,
        "read_test": tested,
        "paths": {"output": str(folder)},
        "tracking": {"name": "none"},
    }
    validation = score - 0.03 * min(miss, 2.3) + generator.normal(0, 0.004)
    update = 0.02 * (learning_rate / 1e-3) ** 0.8 * (1 + relative_norm)
    forgetting = 0.1 * update**0.5 + generator.normal(0, 1e-3)
    result = {
        "run_id": folder.name, "folder": str(folder), "method": method, "init": config["init"],
        "model": "all-MiniLM-L6-v2", "data": data, "seed": seed, "control": control,
        "seeds": {"init": seed, "data": seed}, "status": "finished", "metric": "accuracy",
        "score": share if tested else None, "n_test": examples, "majority": 0.5,
        "tested": tested, "loss_test": 0.5 + generator.normal(0, 0.01),
        "output_gap": {"max_abs_logit": gap * generator.uniform(0.8, 1.2), "kl": gap**2},
        "init_seconds": init_seconds * generator.uniform(0.9, 1.1),
        "calibration_seconds": init_seconds * 0.8 if method in ("corda", "eva") else 0.0,
        "train_seconds": 21 + generator.normal(0, 0.5),
        "first_step_gradient_norm": gradient * generator.uniform(0.8, 1.25),
        "trainable_parameters": 55_584 * rank, "total_parameters": 23_157_890, "steps": steps,
        "learning_rate": learning_rate, "rank": rank, "environment": environment, "config": config,
        "notes": ["weights derived from 4-bit values"] if method == "loftq" else [],
    }  # fmt: skip
    if validated:
        result["validation_score"] = min(max(validation, 0.05), 1.0)
        result["validation"] = {"accuracy": result["validation_score"]}
    if ended:
        result["start"] = {
            "norm_A": 1.0, "norm_B": 0.0, "relative_norm": relative_norm,
            "output_gap": {"max_abs_logit": 0.0, "kl": 0.0}, "gradient_norms": {"total": 0.5},
        }  # fmt: skip
        result["end"] = {"update_size": update, "forgetting": forgetting,
                         "forgetting_kind": "1 - mean cosine of pooled representations",
                         "intruder_dimensions": 3.0, "angle_A": 20.0, "angle_B": 50.0}  # fmt: skip
    names = [f"encoder.layer.{block}.{name}" for block in range(blocks) for name in BLOCKS]
    layers = [
        {
            "name": name, "module_type": "Linear",
            "out_features": out, "in_features": inside, "alpha": 16, "scaling": 2.0,
            "rank": rank + int(generator.integers(-3, 4)) if method == "eva" else rank,
            "relative_norm": relative_norm * generator.uniform(0.6, 1.4), "norm_A": 1.0,
            "norm_B": 0.0, "error": 0.09 if method == "loftq" else None, "seconds": 0.01,
            "captured_energy": None if method == "gaussian" else (
                generator.uniform(0.08, 0.32) if method in SUBTRACTING | {"eva"}
                else generator.uniform(0.01, 0.03)),
            "base": "subtract" if method in SUBTRACTING else "keep",
        }
        for name, (out, inside) in zip(names, list(BLOCKS.values()) * blocks, strict=True)
    ]  # fmt: skip
    init = {"method": method, "base": "keep", "seconds": {"total": init_seconds},
            "peak_memory_bytes": 10**8, "calibration_tokens": 4096, "layers": layers}  # fmt: skip
    (folder / "init.json").write_text(json.dumps(init))
    if ended:
        write_end(folder, generator, method, names, rank, update)
    speed = 20 + 400 * abs(0.79 - score) + 10 * miss
    noise = generator.normal(0, 0.035, steps)
    rows = [
        {"step": step, "split": "train", "lr": learning_rate,
         "grad_norm": gradient * (1 + 20 / (10 + step)) / 3, "tokens_per_second": 9000.0,
         "loss": 0.42 + 0.28 * math.exp(-step / speed) + noise[step - 1]}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    if validated:
        rows += [{"step": step, "split": "validation", "accuracy": 0.7,
                  "loss": 0.46 + 0.25 * math.exp(-step / speed)}
                 for step in range(0, steps + 1, max(1, steps // 4))]  # fmt: skip
    if ended:
        rows += [{"step": step, "split": "update", "update_size": update * (step / steps) ** 0.6}
                 for step in sorted({min(100, steps), steps})]  # fmt: skip
    if tested:
        rows.append({"step": steps, "split": "test", "loss": 0.5, "accuracy": result["score"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result))


def write_end(folder, generator, method, names, rank, update):
    """end.json and spectra.json."""
    ends = [
        {"name": name, "update_size": update * generator.uniform(0.5, 1.5),
         "intruder_dimensions": int(generator.integers(0, 6)),
         "angle_A": generator.uniform(5, 35), "angle_B": generator.uniform(30, 85)}
        for name in names
    ]  # fmt: skip
    (folder / "end.json").write_text(json.dumps({"layers": ends}))
    spectra = []
    for number, name in enumerate(names):
        values = 12 * np.exp(-np.arange(64) / (12 + number)) + 2
        taken = np.zeros(64)
        if method in SUBTRACTING:
            taken[:rank] = 1.0
        elif method == "eva":
            taken = np.exp(-np.arange(64) / 20) * generator.uniform(0.2, 0.8, 64)
        else:
            taken = generator.uniform(0, 2 * rank / 384, 64)
        spectra.append({"name": name, "singular_values": values.round(5).tolist(),
                        "taken": taken.round(5).tolist() if taken.any() else None})  # fmt: skip
    (folder / "spectra.json").write_text(json.dumps({"layers": spectra}))


def write_sweep(root, seeds=(0, 1), failed=True):
    """`root/sweeps/synthetic` and its runs in `root/runs`, one learning rate a method; one failed
    and one lost run if asked."""
    entries = []
    for method in SYNTHETIC:
        for seed in seeds:
            folder = root / "runs" / f"{method}-{seed}"
            write_run(folder, method, seed)
            overrides = [f"init={method}", f"seed={seed}"]
            entries.append({"folder": f"runs/{folder.name}", "overrides": overrides,
                            "status": "finished"})  # fmt: skip
    if failed:
        entries.append({"folder": "runs/pissa-7", "overrides": ["init=pissa", "seed=7"],
                        "status": "failed"})  # fmt: skip
        entries.append({"folder": "runs/lost", "overrides": ["init=eva", "seed=8"],
                        "status": "finished"})  # fmt: skip
    return write_manifest(root, "synthetic", entries, heading="made-up numbers")


def write_manifest(root, name, entries, heading=None):
    sweep = root / "sweeps" / name
    sweep.mkdir(parents=True)
    manifest = {"sweep": name, "heading": heading, "runs": entries}
    (sweep / "manifest.json").write_text(json.dumps(manifest))
    return sweep


def write_grid(
    root, name="grid", methods=tuple(SYNTHETIC), rates=None, ranks=(8,), seeds=(0, 1, 2),
    tasks=("rotten_tomatoes",), bonus=0.0, **settings,
):  # fmt: skip
    """A sweep over learning rates, ranks, seeds and tasks; `settings` go to `write_run`."""
    rates = rates or [10 ** (exponent / 4) for exponent in range(-18, -7, 2)]
    settings = {"validated": True, "ended": True, **settings}
    entries = []
    for data in tasks:
        for method in methods:
            for rank in ranks:
                for rate in rates:
                    for seed in seeds:
                        label = f"{method}-{data}-r{rank}-lr{rate:.1e}-s{seed}"
                        folder = root / "runs" / label
                        harder = -0.1 if data == "r8" else 0.0
                        write_run(folder, method, seed, learning_rate=rate, rank=rank, data=data,
                                  bonus=bonus + harder, **settings)  # fmt: skip
                        entries.append({"folder": f"runs/{label}", "status": "finished"})
    return write_manifest(root, name, entries)


SHARED = ("steps", "blocks", "examples", "bonus", "commit")


def seeds_of(selected):
    return range(max(len(told["runs"]) for told in selected.values()))


def write_protocol(root, name="protocol", control=None, matched=None, **settings):
    """A grid without test scores, and tested runs of each method's best learning rate.

    Args:
        control: a method and the control that two more runs of it stand for.
        matched: a method that is compared at equal update size too.
    """
    sweep = write_grid(root, name, tested=False, **settings)
    shared = {key: settings[key] for key in SHARED if key in settings}
    shared |= {"validated": True, "ended": True}
    manifest = json.loads((sweep / "manifest.json").read_text())
    selected, tested = {}, []
    by_method = {}
    for entry in manifest["runs"]:
        result = json.loads((root / entry["folder"] / "result.json").read_text())
        rates = by_method.setdefault((result["method"], result["rank"]), {})
        rates.setdefault(result["learning_rate"], []).append(result["validation_score"])
    for (method, rank), rates in by_method.items():
        best = max(rates, key=lambda rate: np.mean(rates[rate]))
        ids = []
        for seed in range(len(rates[best])):
            folder = root / "runs" / f"tested-{method}-r{rank}-s{seed}"
            write_run(folder, method, seed, learning_rate=best, rank=rank, **shared)
            ids.append(folder.name)
            tested.append({"folder": f"runs/{folder.name}", "status": "finished"})
        selected[f"{method}-r{rank}"] = {
            "method": method, "rank": rank, "learning_rate": best, "runs": ids,
            "validation_score": float(np.mean(rates[best])),
            "at_edge": best in (min(rates), max(rates)),
        }  # fmt: skip
    if control:
        method, control = control
        for seed in range(2):
            folder = root / "runs" / f"control-{seed}"
            write_run(folder, method, seed, control=control, **shared)
            tested.append({"folder": f"runs/{folder.name}", "status": "finished"})
        selected[f"{method}-{control}"] = {
            "method": method, "rank": 8, "learning_rate": 1e-3, "at_edge": False,
            "runs": ["control-0", "control-1"],
        }  # fmt: skip
    equal = {}
    if matched:
        for seed in seeds_of(selected):
            folder = root / "runs" / f"matched-{seed}"
            write_run(folder, matched, seed, learning_rate=5e-4, **shared)
            tested.append({"folder": f"runs/{folder.name}", "status": "finished"})
        equal[matched] = {"arm": matched, "rank": 8, "learning_rate": 5e-4,
                          "runs": [f"matched-{seed}" for seed in seeds_of(selected)]}  # fmt: skip
    manifest["runs"] += tested
    (sweep / "manifest.json").write_text(json.dumps(manifest))
    runs = [entry["folder"].removeprefix("runs/") for entry in manifest["runs"]]
    protocol = {"stages": [{"name": "grid", "runs": runs}], "selected": selected,
                "equal_update": equal}  # fmt: skip
    (sweep / "protocol.json").write_text(json.dumps(protocol))
    return sweep


def long_sentences(texts, most=25):
    """The sentences with more words than a reader takes in at once."""
    return [one for text in texts for one in text.split(". ") if len(one.split()) > most]
