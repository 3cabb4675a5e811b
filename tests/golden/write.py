"""Write the golden files. This script runs with the code of commit 1d1a888; see README.md.

python tests/golden/write.py networks factors adapters checkpoints calibrations cache names runs
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import golden_networks as golden
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_init
from lora_init import Calibration, LoraConfig, LoraModel, calibrate, list_initializers

DATA = golden.DATA

VARIANTS: list[Any] = [
    *({"name": "pissa", "niter": count} for count in (1, 4, 16)),
    {"name": "corda", "corda_method": "kpm"},
    {"name": "corda", "damping": 0.01},
    {"name": "eva", "rho": 1.0},
    {"name": "eva", "center": False, "whiten": True},
    {"name": "eva", "budget": "parameters"},
    {"name": "gora", "gamma": 0.1, "smallest": 1.0, "largest": 2.0},
    {"name": "init_ab", "gamma": 2.0},
    {"name": "loftq", "loftq_iter": 1},
    {"name": "loftq", "loftq_bits": 2, "loftq_iter": 2},
    {"name": "loftq", "quantizer": "uniform", "block_size": 16},
    {"name": "lora_ga", "gamma": 4.0},
    {"name": "lora_one", "gamma": 16.0},
    {"name": "matched_norm", "reference": "milora"},
    {"name": "qpissa", "iterations": 1},
    {"name": "qpissa", "bits": 2, "quantizer": "uniform"},
    {"name": "qera", "bits": 2},
]
"""Settings with numerics of their own, besides every method's defaults."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "kept": {"method": "kaiming"},
    "kept_rslora": {"method": "orthogonal", "lora_alpha": 3, "use_rslora": True},
    "kept_other_ranks": {"method": "eva", "r": 6},
    "kept_frozen_factor": {"method": "mica"},
    "subtracted": {"method": "pissa"},
    "subtracted_rslora": {"method": "corda", "lora_alpha": 3, "use_rslora": True},
    "subtracted_patterns": {
        "method": "milora",
        "rank_pattern": {"wide": 2},
        "alpha_pattern": {"tall": 12},
    },
    "subtracted_dora": {"method": "olora", "use_dora": True},
    "dora": {"method": "kaiming", "use_dora": True},
    "trained_biases": {"method": "kaiming", "bias": "all"},
    "bias_of_factor": {"method": "pissa", "lora_bias": True},
    "modules_to_save": {"method": "pissa", "modules_to_save": ["head"]},
    "embedding": {"method": "kaiming", "network": "mixed"},
    "embedding_subtracted": {"method": "pissa", "network": "mixed"},
    "quantized": {"method": "loftq"},
    "quantized_inputs": {"method": "qera"},
}
"""Settings of saved adapters and checkpoints; what is left out is in `case_of`."""

CHECKPOINTS = (
    "kept", "subtracted", "dora", "trained_biases", "modules_to_save", "quantized",
    "quantized_inputs",
)  # fmt: skip

TARGETS = {"dense": ["tall", "wide"], "mixed": ["words", "project", "picture"]}


# -- networks and inputs -----------------------------------------------------------------------


def write_networks() -> None:
    """Weights with separate singular values, so that their vectors are stable to rounding."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name, kind in golden.NETWORKS.items():
        model = kind()
        for key, value in model.state_dict().items():
            if value.ndim > 1:
                matrix = value.mT if key == "project.weight" else value.flatten(1)
                made = separated(*matrix.shape, generator)
                made = made.mT if key == "project.weight" else made.view_as(value)
            else:
                made = 0.1 * torch.randn(value.shape, generator=generator)
            tensors[f"{name}/{key}"] = made.contiguous()
    write("networks", tensors)
    spread = torch.linspace(1.5, 0.3, 32)
    write(
        "inputs",
        {
            "arithmetic/probe": golden.arithmetic(),
            "dense/x": torch.randn(8, 32, generator=generator),
            "dense/calibration": spread * torch.randn(3, 64, 32, generator=generator),
            "dense/labels": torch.randint(golden.CLASSES, (3, 64), generator=generator),
            "mixed/x": torch.randint(golden.WORDS, (8, 16), generator=generator),
            "mixed/calibration": torch.randint(golden.WORDS, (3, 24, 16), generator=generator),
            "mixed/labels": torch.randint(golden.CLASSES, (3, 24), generator=generator),
        },
    )


def separated(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix whose singular values differ, but not by so much that float32 rounding shows."""
    count = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    head = torch.linspace(2.4, 0.6, 7, dtype=torch.float64)[:count]
    tail = torch.linspace(0.5, 0.1, max(count - 7, 0), dtype=torch.float64)
    return ((left * torch.cat([head, tail])) @ right.mT).float()


# -- factors -----------------------------------------------------------------------------------


def write_factors() -> None:
    """Every method and variant on linear layers and on the other modules it supports."""
    cases, tensors = {}, {}
    for method in [*(spec.name for spec in list_initializers()), *VARIANTS]:
        for number, case in enumerate(factor_cases(method)):
            name = f"{label(method)}-{case['network']}-{number}"
            model = golden.start(case)
            tensors |= {f"{name}/{key}": value for key, value in golden.factors(model).items()}
            if has_bases(method, case):
                bases = golden.bases(model)
                tensors |= {f"{name}/{key}.base": value for key, value in bases.items()}
            scalings = {target.name: target.scaling for target in model.plan.targets}
            cases[name] = {**case, "scalings": scalings}
    write("factors", tensors)
    write_json("factors", cases)


def has_bases(method: Any, case: dict[str, Any]) -> bool:
    """Whether a case stores what became of the base: one case of each way to change it."""
    base = LoraConfig(init_lora_weights=method).initializer()[0].base
    chosen = case["settings"]["r"] == 4 and case["settings"]["use_rslora"]
    if case["network"] == "mixed":
        return method in ("pissa", "loftq")
    return chosen and (base == "replace" or (base == "subtract" and isinstance(method, str)))


def factor_cases(method: Any) -> list[dict[str, Any]]:
    """Four settings of linear layers for a method, two for a variant, one of other modules."""
    spec, _ = LoraConfig(init_lora_weights=method).initializer()
    dense = [
        {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
        for rank in (2, 4)
        for alpha, rslora in ((rank, False), (2 * rank**0.5, True))
    ]
    if not isinstance(method, str):
        dense = [dense[0], dense[-1]]
    targets = ["words"] * ("Embedding" in spec.module_types) + ["project", "picture"]
    cases = [("dense", {**one, "target_modules": TARGETS["dense"]}) for one in dense]
    cases.append(("mixed", {**dense[-1], "target_modules": targets}))
    return [{"network": net, "method": method, "settings": one} for net, one in cases]


def label(method: Any) -> str:
    if isinstance(method, str):
        return method
    return "_".join(str(part) for pair in method.items() for part in pair if pair[0] != "name") + (
        f"_{method['name']}"
    )


# -- adapters, checkpoints, calibrations -------------------------------------------------------


def case_of(name: str) -> dict[str, Any]:
    settings = {"r": 4, "lora_alpha": 6, **ADAPTERS[name]}
    net = settings.pop("network", "dense")
    settings.setdefault("target_modules", TARGETS[net])
    return {"network": net, "method": settings.pop("method"), "settings": settings}


def trained(case: dict[str, Any]) -> LoraModel:
    """A few steps of gradient descent, so that every trained tensor moves."""
    model = golden.start(case)
    data = golden.calibration(case["network"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for batch in data:
        optimizer.zero_grad()
        data.loss(model, batch).backward()
        optimizer.step()
    return model.eval()


def write_adapters() -> None:
    folder = DATA / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    logits = {}
    for name in ADAPTERS:
        case = case_of(name)
        model = trained(case)
        model.save_pretrained(folder / name)
        logits[name] = model(golden.inputs(case["network"])).detach()
    write("adapter_logits", logits)
    write_json("adapters", {name: case_of(name) for name in ADAPTERS})


def write_checkpoints() -> None:
    tensors, logits = {}, {}
    for name in CHECKPOINTS:
        case = case_of(name)
        model = trained(case)
        tensors |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
        logits[f"{name}.logits"] = model(golden.inputs(case["network"])).detach()
    write("checkpoints", {**tensors, **{f"logits/{k}": v for k, v in logits.items()}})
    write_json("checkpoints", {name: case_of(name) for name in CHECKPOINTS})


def write_calibrations() -> None:
    """Moments in both precisions with gradients, a sketch, and the starts that they give."""
    settings = {"r": 4, "target_modules": TARGETS["dense"]}
    methods = ["eva", {"name": "corda", "corda_method": "kpm"}, "lora_ga"]
    configs = [LoraConfig(init_lora_weights=method, **settings) for method in methods]
    data = golden.calibration("dense")
    found = {
        "exact": calibrate(golden.network("dense"), configs, data),
        "sketch": calibrate(golden.network("dense"), configs[:1], data),
    }
    folder = DATA / "calibrations"
    folder.mkdir(exist_ok=True)
    starts, tensors = {}, {}
    for name, calibration in found.items():
        calibration.save(folder / f"{name}.safetensors")
        for config in configs if name == "exact" else configs[:1]:
            method = config.init_lora_weights
            case = {"network": "dense", "method": method, "settings": settings}
            start = f"{name}-{label(method)}"
            made = golden.factors(golden.start(case, data=calibration))
            tensors |= {f"{start}/{key}": value for key, value in made.items()}
            starts[start] = {"file": name, **case}
    write("calibration_factors", tensors)
    write_json("calibrations", starts)


def write_cache() -> None:
    """The user's cache folder after two starts."""
    folder = DATA / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["LORA_INIT_CACHE"] = str(folder)
    for case in ("pissa-dense-3", "corda-dense-3"):
        golden.start(golden.read_json("factors")[case], cache=True)


# -- public names ------------------------------------------------------------------------------


def write_names() -> None:
    """What users may write: public names, fields, methods and keyword arguments."""
    spec = list_initializers("pissa")[0]
    plan = lora_init.get_peft_model(
        golden.network("dense"), LoraConfig(target_modules=["tall"]), dry_run=True
    )
    own = set(dir(LoraModel)) - set(dir(nn.Module))
    functions = [name for name in lora_init.__all__ if inspect.isfunction(getattr(lora_init, name))]
    write_json(
        "names",
        {
            "lora_init": sorted(lora_init.__all__),
            "methods": [spec.name for spec in list_initializers()],
            "Initializer": fields_and_methods(spec),
            "Factors": fields_and_methods(lora_init.Factors(torch.zeros(1, 1), torch.zeros(1, 1))),
            "Replacement": fields_and_methods(lora_init.Replacement),
            "CalibrationRequest": fields_and_methods(lora_init.CalibrationRequest),
            "Calibration": fields_and_methods(Calibration),
            "InitReport": fields_and_methods(lora_init.InitReport),
            "LoraConfig": fields_and_methods(LoraConfig),
            "Plan": fields_and_methods(plan),
            "Target": fields_and_methods(plan.targets[0]),
            "LoraModel": sorted(name for name in own if not name.startswith("_")),
            "parameters": {
                name: list(inspect.signature(getattr(lora_init, name)).parameters)
                for name in sorted(functions)
            },
        },
    )


def fields_and_methods(described: Any) -> list[str]:
    names = {field.name for field in dataclasses.fields(described)}
    kind = described if isinstance(described, type) else type(described)
    names |= {name for name in dir(kind) if not name.startswith("_")}
    return sorted(name for name in names if not name.startswith("_"))


# -- runs --------------------------------------------------------------------------------------

RUN = [
    "model=local", "model.path=model", "model.name=tiny", "data=table", "data.path=reviews.csv",
    "data.text_column=review", "data.label_column=verdict", "data.validation_share=0.2",
    "data.test_share=0.3", "training.steps=3", "training.batch_size=4", "lora.r=2",
    "calibration.samples=8", "runtime.device=cpu", "paths.outputs=results",
]  # fmt: skip
SWEEP = ["-m", *RUN, "init=kaiming,pissa", "sweep=golden"]
STOPPED = [*RUN, "init=corda", "training.steps=4", "runtime.checkpoint_every=1"]
LIMIT = "runtime.time_limit_minutes=0.0001"
UNREAD = [*RUN, "init=eva"]
AGAIN = ["-m", *RUN, "init=kaiming,eva", "sweep=golden"]


def write_runs() -> None:
    """A sweep, a run that was stopped after a checkpoint, and one that left its test set unread."""
    target = DATA / "runs"
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        write_reviews(folder / "reviews.csv")
        run(folder, SWEEP)
        for adapter in folder.glob("results/runs/*/adapter"):
            shutil.rmtree(adapter)  # nothing reads it
        run(folder, [*STOPPED, LIMIT], status=None)
        run(folder, [*UNREAD, "read_test=false"])
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".*", "multirun.yaml"))
        for name, arguments in (("stopped", STOPPED), ("unread", UNREAD)):
            run(folder, [*arguments, f"paths.outputs={name}"])
            (whole,) = folder.glob(f"{name}/runs/*/result.json")
            shutil.copy(whole, target / f"{name}_result.json")
    for name in ("environment", "result"):
        for path in target.rglob(f"*{name}.json"):
            path.write_text(json.dumps(anonymous(json.loads(path.read_text())), indent=1) + "\n")
    write_json("runs", {"stopped": STOPPED, "again": AGAIN})


def run(folder: Path, arguments: list[str], status: int | None = 0) -> None:
    """One command of commit 1d1a888, in `folder`."""
    root = Path(lora_init.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "LORA_INIT_CACHE": "off"}
    command = [sys.executable, "-m", "experiments.train", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if status is not None and done.returncode != status:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")


def anonymous(value: Any) -> Any:
    """Without the facts of the machine that wrote it."""
    facts = {"host": "host", "platform": "Linux", "cpu": "CPU", "git_dirty": False}
    if isinstance(value, dict):
        return {key: facts.get(key, anonymous(inner)) for key, inner in value.items()}
    return [anonymous(inner) for inner in value] if isinstance(value, list) else value


def write_model(folder: Path) -> None:
    """A random BERT of one layer, and its tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", "the", "film", "is", "good", "bad", "not", "very"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def write_reviews(path: Path) -> None:
    lines = ["review,verdict"]
    for number in range(60):
        word, verdict = (("good", "fresh"), ("bad", "rotten"))[number % 2]
        filler = " ".join(["very"] * (number // 10) + ["not"] * (number % 10))
        lines.append(f"the film is {word} {filler},{verdict}")
    path.write_text("\n".join(lines) + "\n")


# -- files -------------------------------------------------------------------------------------


def write(name: str, tensors: dict[str, Tensor]) -> None:
    DATA.mkdir(exist_ok=True)
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, DATA / f"{name}.safetensors")
    golden.load.cache_clear()


def write_json(name: str, content: Any) -> None:
    (DATA / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:]:
        globals()[f"write_{part}"]()
