"""Training steps, their memory, and starts of adapters on all experts of a mixture of experts.

The model has the architecture of Qwen3-MoE and random weights. Adapters are on the query and value
projections and on the experts. The floor of a step is one with query and value projections only.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

import lora_init
from lora_init.weights.kinds import known_format

from .peaks import MIB, peak_watch
from .powerlaw import PowerLaw
from .row import LINALG, OURS, PEFT, Case, Row
from .schema import BenchmarkConfig, ExpertsSettings
from .steps import stepper
from .strategies import STRATEGIES
from .timing import Contender, alternate, paired_ratio
from .workload import Batch

TITLE = "Experts"
MODEL = "qwen3_moe"
FLOOR = "query and value projections only"
MATRICES = ("gate_up_proj", "down_proj")


def svd(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.svd(matrix, full_matrices=False)


DECOMPOSITIONS = {"pissa": svd, "pissa_niter_4": svd, "olora": torch.linalg.qr}


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    yield Case("experts", MODEL, "training step", partial(steps, settings))
    for method in settings.experts.methods:
        yield Case("experts", MODEL, method, partial(starts, settings, method))


def mixture(shape: ExpertsSettings, seed: int) -> nn.Module:
    """A Qwen3-MoE with random weights, which computes experts with grouped products."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")
    return model


def adapted(settings: BenchmarkConfig) -> dict[str, nn.Module]:
    """The model as each library adapts it, and with adapters on the projections only."""
    import peft

    model = mixture(settings.experts, settings.seed)
    fields = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": ["q_proj", "v_proj"],
    }
    everything = fields | {"target_parameters": [f"experts.{name}" for name in MATRICES]}
    return {
        OURS: lora_init.get_peft_model(
            copy.deepcopy(model), lora_init.LoraConfig(**everything), seed=settings.seed
        ).train(),
        PEFT: peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**everything)).train(),
        FLOOR: lora_init.get_peft_model(
            copy.deepcopy(model), lora_init.LoraConfig(**fields), seed=settings.seed
        ).train(),
    }


def batches(settings: BenchmarkConfig, count: int) -> list[Batch]:
    shape = settings.experts
    generator = torch.Generator().manual_seed(settings.seed)
    size = shape.batch_size, shape.tokens
    ids = [torch.randint(shape.vocabulary, size, generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def steps(settings: BenchmarkConfig) -> Iterator[Row]:
    """Yield the time of a step and its peak of memory above the adapted model."""
    chosen, cpu = settings.experts, torch.device("cpu")
    models = adapted(settings)
    given = batches(settings, chosen.rounds + 1)
    contenders = {name: stepper(model, given) for name, model in models.items()}
    seconds, losses = defaultdict(list), defaultdict(list)
    for turn in alternate(contenders, chosen.rounds + 1, chosen.budget, cpu, 2):
        losses[turn.name].append(float(turn.result))
        if turn.round:  # the first round warms up
            seconds[turn.name].append(turn.seconds)
    above = paired_ratio(seconds[OURS], seconds[FLOOR]).estimate
    # B is zero at the start, so the first losses of both libraries are that of the base.
    gap = abs(losses[OURS][0] - losses[PEFT][0]) / abs(losses[PEFT][0])
    yield Row(
        "experts", MODEL, "training step", settings.rank, ours=median(seconds[OURS]),
        peft=median(seconds[PEFT]), whole=median(seconds[FLOOR]), error=gap, kind="loss",
        ratio=paired_ratio(seconds[PEFT], seconds[OURS]), note=f"{above:.2f} × the floor",
    )  # fmt: skip
    rises = {name: peak(contender) / MIB for name, contender in contenders.items()}
    yield Row(
        "experts", MODEL, "memory of a step", settings.rank, "MiB", ours=rises[OURS],
        peft=rises[PEFT], whole=rises[FLOOR],
        ratio=paired_ratio([rises[PEFT]], [rises[OURS]]) if rises[OURS] > 0 else None,
        note=f"above the floor: {rises[OURS] - rises[FLOOR]:.0f} MiB, "
        f"PEFT {rises[PEFT] - rises[FLOOR]:.0f} MiB",
    )  # fmt: skip


def peak(contender: Contender) -> int:
    """The peak of memory during one step, above what is in use before it, in bytes."""
    prepared = contender.prepare()
    watch = peak_watch(torch.device("cpu"))
    contender.run(prepared)
    return watch.rise()


def starts(settings: BenchmarkConfig, method: str) -> Iterator[Row]:
    """Yield the time of a start of all experts, whose weights follow a power law.

    PEFT has none of these methods for experts.
    """
    chosen, model = settings.experts, mixture(settings.experts, settings.seed)
    layers = blocks(model)
    matrices = [
        matrix for name, block in layers.items() for matrix in written(block, name, settings.seed)
    ]
    config = lora_init.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights=STRATEGIES[method].ours,
        target_parameters=[f"mlp.experts.{name}" for name in MATRICES],
    )
    decompose = DECOMPOSITIONS[method]
    contenders = {
        OURS: Contender(
            lambda: copy.deepcopy(model),
            lambda prepared: lora_init.get_peft_model(prepared, config, cache=False),
        ),
        LINALG: Contender(
            lambda: None, lambda _: [decompose(matrix) is None for matrix in matrices]
        ),
    }
    seconds, found = defaultdict(list), None
    for turn in alternate(contenders, chosen.rounds + 1, chosen.budget, torch.device("cpu"), 2):
        if turn.round:
            seconds[turn.name].append(turn.seconds)
        elif turn.name == OURS:
            found = turn.result
    yield Row(
        "experts", MODEL, method, settings.rank, ours=median(seconds[OURS]),
        linalg=median(seconds[LINALG]), ratio=paired_ratio(seconds[LINALG], seconds[OURS]),
        peer=LINALG, error=worst(method, found, next(iter(layers.values()))), kind="excess",
        note=f"{len(matrices)} matrices",
    )  # fmt: skip


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The module of experts of each layer, by name."""
    return {name: one for name, one in model.named_modules() if name.endswith("mlp.experts")}


def written(block: nn.Module, layer: str, seed: int) -> Iterator[Tensor]:
    """Write weights that follow a power law to a layer's experts, and yield the matrices."""
    stored = known_format(block)
    for name in MATRICES:
        count, *shape = stored.shape(block, name)
        laws = [PowerLaw(*shape, f"{layer}.{name}.{expert}", seed) for expert in range(count)]
        stored.write(block, torch.stack([law.weight() for law in laws]), name)
        yield from stored.read(block, name)


@torch.no_grad()
def worst(method: str, found: nn.Module | None, block: nn.Module) -> float | None:
    """How much more PiSSA leaves of a matrix than the best factors; the largest of two experts."""
    if found is None or not method.startswith("pissa"):
        return None
    errors = []
    for name in MATRICES:
        layer = found.layers[f"model.layers.0.mlp.experts.{name}"]
        for expert in (0, len(layer.lora_A) - 1):
            weight = known_format(block).read(block, name)[expert].double()
            product = layer.initial_lora_B[expert].double() @ layer.initial_lora_A[expert].double()
            values = torch.linalg.svdvals(weight)[layer.lora_A.shape[1] :]
            errors.append(float((weight - layer.scaling * product).norm() / values.norm()) - 1)
    return max(errors)
