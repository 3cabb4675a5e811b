"""QPiSSA against LoftQ: errors, references and controls against dense computations; verdicts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from experiments.errors import ConfigurationError
from experiments.models.smollm2 import SmolLM2, locate
from experiments.papers import pissa_quantization as page
from experiments.papers import pissa_quantization_claims as claims
from experiments.papers import pissa_quantization_grids as grids
from experiments.papers import pissa_quantization_rows as measured_rows
from experiments.papers.claim import Verdict
from experiments.papers.interval import Interval
from experiments.papers.pissa_quantization_claims import order
from experiments.papers.pissa_quantization_rows import (
    AS_IT_IS,
    ROUNDED,
    PissaQuantizationOptions,
    leading_share,
    norms_of,
    part_of,
    plain_error,
    remaining_error,
)
from experiments.papers.subject import Layer, load_subject
from lora_init.quantization import Quantizer

HOLDS, DIRECTION = Verdict.REPRODUCED, Verdict.SAME_DIRECTION
NOT, CONTRADICTS = Verdict.NOT_REPRODUCED, Verdict.CONTRADICTS


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 4, generator=generator)
    right = torch.randn(4, columns, generator=generator)
    return 0.05 * left @ right + 0.1 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_norms_are_those_of_the_singular_values(shape):
    error = drawn(*shape)
    inputs = torch.randn(200, shape[1], dtype=torch.float64)
    found = norms_of(error, inputs.T @ inputs / 200)
    values = np.linalg.svd(error.double().numpy(), compute_uv=False)
    assert found["nuclear"] == pytest.approx(values.sum())
    assert found["frobenius"] == pytest.approx(math.sqrt((values**2).sum()))
    assert found["spectral"] == pytest.approx(values[0])
    outputs = inputs @ error.double().T
    assert found["output"] == pytest.approx(float(outputs.square().sum(1).mean().sqrt()))
    half = norms_of(error / 2, inputs.T @ inputs / 200)
    assert half == pytest.approx({name: value / 2 for name, value in found.items()})


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("count", [1, 3])
def test_errors_are_those_of_the_alternations_written_out(count):
    weight, quantizer = drawn(64, 128), Quantizer()

    def stored(matrix: torch.Tensor) -> torch.Tensor:
        return quantizer.roundtrip(matrix.float()).double()

    product = torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(count):
        base = stored(weight.double() - product)
        product = cut(weight.double() - base, 8)
    loftq = weight.double() - base - product
    base = torch.zeros_like(product)
    for _ in range(count):
        product = cut(weight.double() - base, 8)
        base = stored(weight.double() - product)
    pissa = weight.double() - base - product
    for method, option, expected in (
        ("loftq", "loftq_iter", loftq),
        ("qpissa", "iterations", pissa),
    ):
        generator = torch.Generator().manual_seed(0)
        found = remaining_error(weight, method, 8, generator, **{option: count})
        # A code at a threshold may fall to the other side, so that norms and not entries agree.
        assert norms_of(found)["nuclear"] == pytest.approx(norms_of(expected)["nuclear"], rel=5e-3)
        assert norms_of(found)["nuclear"] < norms_of(plain_error(weight))["nuclear"]


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(500, 500, 16), (300, 900, 9), (900, 300, 60)]
)
def test_white_noise_holds_what_drawn_noise_does(rows, columns, rank):
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(torch.randn(rows, columns, generator=generator))
    expected = float(values[:rank].sum() / values.sum())
    assert leading_share(rows, columns, rank) == pytest.approx(expected, rel=0.02)


def test_white_noise_of_all_ranks_is_all_of_it():
    assert leading_share(40, 90, 40) == pytest.approx(1)
    with pytest.raises(ValueError, match="rank=41 is not supported: must be 1 to 40"):
        leading_share(40, 90, 41)


def test_the_grid_is_that_of_the_files():
    from gguf import GGMLQuantizationType, dequantize, quantize

    weight = drawn(16, 96)
    kind = GGMLQuantizationType.Q4_1
    expected = dequantize(quantize(weight.numpy(), kind), kind)
    np.testing.assert_allclose(grids.rounded(weight).numpy(), expected, rtol=0, atol=1e-6)


def test_smollm2_is_on_the_grid_and_an_ordinary_weight_is_not():
    path = f"{locate(SmolLM2()).source}/model.safetensors"
    with safe_open(path, framework="pt") as file:
        kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
        for kind in kinds:
            weight = file.get_tensor(f"model.layers.7.{kind}.weight").float()
            assert grids.on_grid(weight), kind
            dithered = grids.dithered(weight, torch.Generator().manual_seed(0))
            assert not grids.on_grid(dithered)
            assert float((dithered - weight).norm() / weight.norm()) < 0.12
    assert not grids.on_grid(drawn(64, 64))
    assert list(measured_rows.variants(drawn(8, 33), torch.Generator())) == []


def test_variants_move_a_weight_as_far_as_they_say():
    weight, generator = drawn(32, 64), torch.Generator().manual_seed(0)
    runs = weight.reshape(-1, 32)
    step = ((runs.amax(1) - runs.amin(1)) / 15)[:, None]
    moved = (grids.rounded(weight).reshape(-1, 32) - runs).abs()
    assert bool((moved <= 0.502 * step + 1e-3 * runs.abs().amax()).all())
    noise = (grids.noisy(weight, generator) - weight).norm()
    assert float(noise) == pytest.approx(float(moved.norm()), rel=1e-4)
    spread = (grids.dithered(weight, generator).reshape(-1, 32) - runs) / step
    assert float(spread.abs().max()) <= 0.5 + 1e-4
    assert float(spread.std()) == pytest.approx(12**-0.5, rel=0.05)


def test_measured_rows_are_those_of_a_dense_computation():
    subject = load_subject("minilm")
    layer = measured_rows.chosen_layers(subject, 1)[0]
    weight = subject.weight(layer)
    error = weight.double() - Quantizer().roundtrip(weight).double()
    values = np.linalg.svd(error.numpy(), compute_uv=False)
    settings = PissaQuantizationOptions(ranks=[12], iterations=[1, 2], controls=False)
    case = measured_rows.Case(layer, weight, torch.eye(384), [12], settings.judged_rank(384), True)
    frame = pd.DataFrame(measured_rows.rows_of(case, settings))
    (found,) = frame[(frame["method"] == "loftq") & (frame["T"] == 1)].to_dict("records")
    assert case.judged == 12  # of 384: 1 / 32
    assert found["nuclear"] == pytest.approx(100 * values[:12].sum() / values.sum(), abs=0.02)
    kept = math.sqrt((values[12:] ** 2).sum() / (values**2).sum())
    assert found["frobenius"] == pytest.approx(100 * (1 - kept), abs=0.02)
    assert found["output"] == pytest.approx(found["frobenius"])  # inputs are white


def test_blocks_are_evenly_spaced():
    layers = [Layer(f"{block}.q", block, "q_proj") for block in (2, 7, 12, 17, 22, 27)]
    assert measured_rows.detailed_blocks(layers, 3) == {7, 17, 27}
    assert measured_rows.detailed_blocks(layers, 1) == {17}
    assert measured_rows.detailed_blocks(layers, 9) == {2, 7, 12, 17, 22, 27}


def test_parts_have_the_papers_names():
    names = {
        "self_attn.q_proj": "Q", "attention.self.key": "K", "attention.output.dense": "O",
        "intermediate.dense": "up", "output.dense": "down", "mlp.gate_proj": "gate", "c_fc": "c_fc",
    }  # fmt: skip
    assert {kind: part_of(kind) for kind in names} == names


ABOVE, NEAR, BELOW = Interval(2, 1, 3), Interval(0.1, -1, 1.2), Interval(-2, -3, -1)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([ABOVE, ABOVE], HOLDS),
        ([ABOVE, NEAR], DIRECTION),
        ([ABOVE, BELOW], NOT),
        ([NEAR, NEAR], NOT),
        ([BELOW, BELOW], CONTRADICTS),
    ],
)
def test_an_order_is_judged_by_intervals(differences, verdict):
    assert order(differences) is verdict


def made(
    loftq: float, pissa: float, gain: float, mlp: float, output: float = 3.0, sides: float = 1.0
) -> pd.DataFrame:
    """Rows of two models of three blocks.

    PiSSA's reductions: Q and K `pissa`, V and O smaller by `sides`, up by `mlp`.
    """
    rows = []
    smaller = {"Q": 0.0, "K": 0.0, "V": sides, "O": sides, "up": mlp}
    for model in ("one", "other"):
        for block in range(3):
            for part, less in smaller.items():
                for method, base in (("loftq", loftq), ("pissa", pissa)):
                    for count in (1, 5):
                        value = base - less + gain * (count == 5) + 0.01 * block
                        other = loftq + (output if method == "pissa" else 0) + 0.01 * block
                        rows.append(
                            {"model": model, "block": block, "part": part, "method": method,
                             "T": count, "rank": 8, "variant": AS_IT_IS, "nuclear": value,
                             "frobenius": value, "spectral": value, "output": other, "noise": 5.0,
                             "smaller": 6.0, "detailed": True}
                        )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        (made(7, 11, 8, 4), [HOLDS, HOLDS, HOLDS, HOLDS, HOLDS]),
        (made(9, 5, -1, -4, -3), [CONTRADICTS] * 5),
        (made(-8, 1, 8, 4), [NOT, NOT, HOLDS, HOLDS, HOLDS]),
        (made(7, 11, 8, 4, -3), [HOLDS, HOLDS, HOLDS, HOLDS, DIRECTION]),
        (made(7, 11, 8, 4, sides=-1), [HOLDS, HOLDS, HOLDS, DIRECTION, HOLDS]),
        (made(7, 11, 8, 4, sides=5), [HOLDS, HOLDS, HOLDS, DIRECTION, HOLDS]),
        (made(7, 11, 8, 0), [HOLDS, HOLDS, HOLDS, NOT, HOLDS]),
    ],
)
def test_verdicts_follow_the_rows(rows, verdicts):
    # Blocks differ by a constant only, so that every interval of a difference is a point.
    found = claims.all_claims(rows, {"one": 8, "other": 8})
    assert [claim.verdict for claim in found] == verdicts
    assert [claim.published for claim in found] == [True] * 4 + [False]


def test_a_controls_lead_is_that_of_its_weights():
    rows = made(7, 11, 8, 4)
    rounded = made(7, 10, 8, 4).assign(variant=ROUNDED)
    both = pd.concat([rows, rounded[rounded["model"] == "one"]])
    found = page.leads_by_variant(both, {"one": 8, "other": 8})
    assert found["model"].tolist() == ["one", "one", "other"]
    assert found["variant"].tolist() == [AS_IT_IS, ROUNDED, AS_IT_IS]
    assert found["lead"].str.split().str[0].tolist() == ["+4.0", "+3.0", "+4.0"]


def test_a_rank_above_a_layer_is_refused_by_name(composed_paper):
    settings = composed_paper("pissa_quantization", "smoke", "ranks=[400]")
    with pytest.raises(ConfigurationError, match=r"ranks=\[400\]: rank 400 exceeds .* 384 × 384"):
        measured_rows.measure(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations=[5]", r"iterations=\[5\] is not supported: must be two or more"),
        ("iterations=[5,1]", r"iterations=\[5, 1\] .* ascending"),
        ("share=1.5", "share=1.5 is not supported: must be a share"),
        ("blocks=0", "blocks=0 is not supported: must be an integer >= 1, or null"),
        ("detailed=0", "detailed=0 is not supported: must be an integer >= 1"),
        ("ranks=[0,4]", r"ranks=\[0, 4\] is not supported: must be one or more"),
        ("models=[]", "must be one model or more"),
    ],
)
def test_bad_settings_are_refused(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("pissa_quantization", "fast", override)
