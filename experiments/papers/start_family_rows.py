"""The rows of `start_family`: starts of the same layers, compared without any training.

All starts get the statistics of one pass over the data, and the scaling 1. `VARIANTS` are methods
with the settings under which they should equal others. `written_out` computes three published
starts from their formulas in float64, without the library's solvers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import Factors, LoraConfig, calibrate, init_factors, list_initializers
from lora_init.progress import tracked
from lora_init.quantization import Quantizer

from .reproduction import Measurement, Options, require_at_least
from .subject import Layer, Subject
from .tasks import described_data, load_with_task, measured_layers, task_batches

VARIANTS = {
    "eva": {"name": "eva", "rho": 1.0},
    "eva_frozen": {"name": "eva_frozen", "rho": 1.0},
    "gora": {"name": "gora", "smallest": 1.0, "largest": 1.0},
    "sc_lora, beta 0": {"name": "sc_lora", "beta": 0.0},
    "lora_ga, LOI": {"name": "lora_ga", "direction": "A2rBr", "scale": "unit"},
    "srr, none preserved": {"name": "srr", "preserved": 0},
    "geora, all": {"name": "geora", "fraction": 1.0},
}
LEARN, KEEP = "train", "validation"
BITS = (2, 3, 4)
DRAWS = 200
GAMMA = 16.0
"""LoRA-GA's default gamma, here and in PEFT."""
LIFT = 1e-6
"""By this share of its mean, QERA raises the diagonal of R."""
IPA, LOI, UNQUANTIZED = "IPA, written out", "LOI, written out", "QERA at Q = 0, written out"
BETAS = (0.5, 0.8, 0.9)


@dataclass
class StartFamilyOptions(Options):
    """What is compared.

    Attributes:
        models: as `load_with_task` takes them.
        rank: the rank of all starts.
        blocks: how many transformer blocks are measured, at equal distances; 0 for all.
        examples, batch_size, length: of the data for statistics; another split of the same size is
            the set to keep.
    """

    models: list[str] = field(default_factory=lambda: ["minilm", "smollm2"])
    rank: int = 8
    blocks: int = 2
    examples: int = 64
    batch_size: int = 8
    length: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "blocks")
        require_at_least(self, 1, "rank", "examples", "batch_size", "length")


def measure(options: StartFamilyOptions) -> Measurement:
    """Compute all starts of some layers of each model, and compare them."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("pairs", "gradients", "inputs", "signs", "kept", "quantized")
    }
    facts = {"adapter": "s = 1", "left out": "methods of a second checkpoint"}
    for name in options.models:
        subject = load_with_task(name, options.device)
        layers = measured_layers(subject, distance(subject, options.blocks))
        data = statistics(subject, layers, options)
        for layer in tracked(layers, f"starts of {subject.short}"):
            found = {"model": subject.short, "layer": layer.name}
            weight, given = subject.weight(layer), data[layer.name]
            starts = starts_of(weight, given, layer.name, options)
            starts |= written_out(weight, given, options.rank)
            rows["pairs"] += [found | row for row in pairs(starts)]
            rows["gradients"].append(found | captured(given["gradient"], options))
            rows["inputs"].append(found | input_shares(given["inputs"], options.rank))
            rows["signs"].append(found | sign_shares(given["gradient"], options.rank))
            rows["kept"] += [found | row for row in positive(weight, given, options.rank)]
            rows["quantized"] += [
                found | row for row in output_errors(weight, given["inputs"], options)
            ]
        facts[subject.short] = f"{len(layers)} layers; {described_data(name)}"
    return Measurement(options, {name: pd.DataFrame(found) for name, found in rows.items()}, facts)


def distance(subject: Subject, blocks: int) -> int:
    """One in so many blocks is measured, to measure `blocks` of them; 0 is for all."""
    return len({layer.block for layer in subject.layers}) // blocks if blocks else 1


def statistics(
    subject: Subject, layers: list[Layer], options: StartFamilyOptions
) -> dict[str, dict[str, Any]]:
    """By layer: moments of the inputs of two sets, the gradient, and moments of its outputs."""
    names = [layer.name for layer in layers]
    inputs, moved = (
        LoraConfig(r=options.rank, target_modules=names, init_lora_weights=method)
        for method in ("lora_null", "lora_da")
    )
    size = {"size": options.batch_size, "length": options.length}
    batches = [task_batches(subject, split, options.examples, **size) for split in (LEARN, KEEP)]
    learned = calibrate(subject.model, [inputs, moved], batches[0])
    kept = calibrate(subject.model, inputs, batches[1]).layers
    learn, gradients = (
        learned.of(names, spec.request(settings)).layers
        for spec, settings in (inputs.initializer(), moved.initializer())
    )
    return {
        name: {
            "inputs": learn[name].inputs,
            "keep": kept[name].inputs,
            "gradient": gradients[name].gradient,
            "output_moments": gradients[name].output_moments,
        }
        for name in names
    }


def starts_of(
    weight: Float[Tensor, "out in"], given: Mapping[str, Any], name: str, options: Any
) -> dict[str, Factors]:
    """The factors of every method that reads no second checkpoint, and of the variants."""
    wanted = {spec.name: {"name": spec.name} for spec in list_initializers()} | VARIANTS
    specs = {spec.name: spec for spec in list_initializers()}
    found = {}
    for label, setting in wanted.items():
        spec = specs[setting["name"]]
        if "target_weight" in spec.reads:
            continue
        inputs = given["inputs"]
        if spec.name == "sc_lora":
            inputs = {"learn": inputs, "keep": given["keep"]}
        found[label] = init_factors(
            weight,
            setting,
            r=options.rank,
            inputs=inputs,
            gradient=given["gradient"],
            output_moments=given["output_moments"] if "output_moments" in spec.reads else None,
            seed=options.seed,
            name=name,
        )
    return found


def written_out(
    weight: Float[Tensor, "out in"], given: Mapping[str, Any], rank: int
) -> dict[str, Factors]:
    """IPA, LOI and QERA at Q = 0 from their papers' formulas, in float64.

    IPA: the leading eigenvectors of the centered covariance. LOI: U_{1:r} V_{r+1:2r}ᵀ of the
    gradient, without its factor. QERA: SVD_r(W R^(1/2)) R^(-1/2) with a raised diagonal of R.
    """
    inputs = given["inputs"]
    principal = torch.linalg.eigh(inputs.covariance.double()).eigenvectors[:, -rank:]
    left, _, right = torch.linalg.svd(given["gradient"].double(), full_matrices=False)
    moment = inputs.second_moment.double()
    moment.diagonal().add_(LIFT * moment.diagonal().mean())
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(0).sqrt()
    leading, sizes, outputs = torch.linalg.svd(
        weight.double() @ (vectors * root) @ vectors.mT, full_matrices=False
    )
    unquantized = sizes[:rank, None] * outputs[:rank] @ (vectors / root) @ vectors.mT
    return {
        IPA: Factors(principal.mT.float(), torch.zeros(len(weight), rank)),
        LOI: Factors(right[rank : 2 * rank].float(), left[:, :rank].float()),
        UNQUANTIZED: Factors(unquantized.float(), leading[:, :rank].float()),
    }


def pairs(starts: Mapping[str, Factors]) -> list[dict[str, Any]]:
    """For each pair: the overlap of both spaces, and the cosine and ratio of both maps.

    The overlap of two r-dimensional spaces is the mean squared cosine of their principal angles: 1
    for the same space, r / n on average for random ones in n dimensions.
    """
    bases = {label: (basis(f.lora_A.mT), basis(output(f))) for label, f in starts.items()}
    maps = {label: start_map(factors) for label, factors in starts.items()}
    rows = []
    for one, two in itertools.combinations(starts, 2):
        row: dict[str, Any] = {"one": one, "two": two}
        for side, left, right in zip(("A", "B"), bases[one], bases[two], strict=True):
            row[side] = overlap(left, right)
        (kind, first), (other, second) = maps[one], maps[two]
        if kind == other:
            norms = float(first.norm()), float(second.norm())
            row["cosine"] = float((first * second).sum()) / math.prod(norms)
            row["ratio"] = norms[1] / norms[0]
        rows.append(row)
    return rows


def start_map(factors: Factors) -> tuple[str, Tensor]:
    """What decides a first step, and its kind: only maps of one kind are compared.

    The product B A, or the Gram matrix of the other factor if A or B is zero. Two factors whose
    product is zero have both Gram matrices, in a kind of their own.
    """
    lora_A, lora_B = factors.lora_A.double(), output(factors).double()
    product = lora_B @ lora_A
    if product.norm() > 1e-6 * lora_A.norm() * lora_B.norm():
        return "product", product
    grams = {"A": lora_A.mT @ lora_A, "B": lora_B @ lora_B.mT}
    present = {name: gram for name, gram in grams.items() if gram.any()}
    return "".join(present), torch.cat([gram.flatten() for gram in present.values()])


def output(factors: Factors) -> Float[Tensor, "out rank"]:
    return factors.output_factor.detach()


def basis(columns: Float[Tensor, "n rank"]) -> Float[Tensor, "n k"] | None:
    """An orthonormal basis of the columns' span; None if they are zero."""
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    kept = left[:, values > 1e-6 * values[0]] if values[0] > 0 else left[:, :0]
    return kept if kept.shape[1] else None


def overlap(one: Tensor | None, two: Tensor | None) -> float | None:
    if one is None or two is None:
        return None
    return float((one.mT @ two).square().sum()) / min(one.shape[1], two.shape[1])


def captured(gradient: Float[Tensor, "out in"], options: Any) -> dict[str, float]:
    """What the first step of LoRA-GA can follow, by the choice of 2r singular triplets.

    With rows of A from the right vectors in one set and columns of B from the left vectors in
    another, the step contains the triplets of both sets. PEFT draws one set for both: the share of
    ‖G‖² is that of r triplets, for which this has the mean and the central 95 % of random draws.

    The cosine of the first step and G follows from the singular values alone: triplet i moves by
    S_i times the square of its factor's norm. PEFT multiplies the columns of B by S and k, and
    leaves the rows of A at norm 1, where the authors multiply both by k.
    """
    rank = options.rank
    values = torch.linalg.svdvals(gradient.double())
    energy = values.square()
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.stack(
        [energy[torch.randperm(2 * rank, generator=generator)[:rank]].sum() for _ in range(DRAWS)]
    )
    shares = drawn / energy[: 2 * rank].sum()
    low, high = (float(shares.quantile(level)) for level in (0.025, 0.975))
    of_A, of_B = values[:rank], values[rank : 2 * rank]
    scaled = torch.cat([of_A, of_B**3 * len(gradient) ** 0.5 / GAMMA])
    return {
        "different sets": float(energy[: 2 * rank].sum() / energy.sum()),
        "the same set": float(shares.mean()),
        "low": low,
        "high": high,
        "cosine": float(energy[: 2 * rank].sum().sqrt() / values.norm()),
        "cosine, B times S": float((scaled @ values[: 2 * rank]) / scaled.norm() / values.norm()),
    }


def input_shares(inputs: Any, rank: int) -> dict[str, float]:
    """Shares of the inputs' energy on r random directions, and on the r least used ones."""
    moment = inputs.second_moment.double()
    values = torch.linalg.eigvalsh(moment)
    return {
        "width": len(values),
        "random": rank / len(values),
        "least used": float(values[:rank].clamp_min(0).sum() / values.sum()),
    }


def sign_shares(gradient: Float[Tensor, "out in"], rank: int) -> dict[str, float]:
    """Shares of ‖G‖² and ‖sign G‖² in their leading r triplets."""
    shares = {}
    for name, matrix in (("G", gradient.double()), ("sign G", gradient.double().sign())):
        energy = torch.linalg.svdvals(matrix).square()
        shares[name] = float(energy[:rank].sum() / energy.sum())
    return shares


def positive(weight: Tensor, given: Mapping[str, Any], rank: int) -> list[dict[str, Any]]:
    """How many of SC-LoRA's eigenvalues are positive, for each beta."""
    learn, keep = (given[name].second_moment.double() for name in ("inputs", "keep"))
    rows = []
    for beta in BETAS:
        mixed = (1 - beta) * learn / learn.trace() - beta * keep / keep.trace()
        values = torch.linalg.eigvalsh(weight.double() @ mixed @ weight.double().mT)
        count = int((values > 1e-6 * values.abs().max()).sum())
        rows.append({"beta": beta, "positive": count, "enough": count >= rank})
    return rows


class ThreeBits(Quantizer):
    """Blocks of 64 values on 8 even steps between plus and minus the largest; 3 bits."""

    def roundtrip(self, weight: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        blocks = weight.reshape(-1, self.block_size)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        steps = ((blocks / scale + 1) * 3.5).round()
        return ((steps / 3.5 - 1) * scale).reshape(weight.shape)


def output_errors(weight: Tensor, inputs: Any, options: Any) -> list[dict[str, Any]]:
    """Relative output errors of a quantized layer with an adapter: QERA, SRR, and SRR refitted."""
    moment = inputs.second_moment.double()
    rows = []
    for bits in BITS:
        settings = {
            "qera": {"name": "qera"},
            "srr": {"name": "srr"},
            "srr, refitted": {"name": "srr", "refit": True},
        }
        chosen = {} if bits == 3 else {"bits": bits}
        for method, setting in settings.items():
            start = init_factors(
                weight,
                setting | chosen,
                r=options.rank,
                inputs=inputs,
                seed=options.seed,
                quantizer=ThreeBits() if bits == 3 else None,
            )
            base = start.replacement.base(weight, 1.0).double()
            left = weight.double() - base - start.lora_B.double() @ start.lora_A.double()
            error = ((left @ moment) * left).sum() / ((weight.double() @ moment) * weight).sum()
            rows.append({"bits": bits, "method": method, "error": float(error.clamp_min(0).sqrt())})
    return rows
