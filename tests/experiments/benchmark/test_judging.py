"""Peers, floors and judges against small computations by hand."""

from types import SimpleNamespace

import pytest
import torch
from known_rates import RATES

from experiments.benchmark import exact, floors, judging, quality, rates, references
from experiments.benchmark.contenders import LayerFactors
from experiments.benchmark.strategies import METHODS

CPU = torch.device("cpu")


def given(**changes):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(9, 6, generator=generator) for name in ("a", "b")}
    moment = torch.randn(50, 6, generator=generator)
    moment = moment.T @ moment / 50
    return exact.Given(weights, dict.fromkeys(weights, moment), weights, 2, **changes)


def test_the_straightforward_computations():
    start = given()
    weight, moment = start.weights["a"].double(), start.moments["a"].double()
    basis, triangle = exact.orthogonalized(start)["a"]
    assert (
        quality.difference(
            basis @ triangle, torch.linalg.qr(weight)[0][:, :2] @ (torch.linalg.qr(weight)[1][:2])
        )
        < 1e-6
    )
    for made, matrix in (
        (exact.decomposed(start), weight),
        (exact.decomposed_products(start), weight @ moment),
    ):
        left = torch.linalg.svd(matrix, full_matrices=False)[0]
        assert quality.overlap(made["a"][0], left[:, :2]) > 1 - 1e-9
        assert quality.overlap(made["a"][1], left[:, -2:]) > 1 - 1e-9
    assert exact.decomposed_gradients(start)["a"][0].shape == (9, 4)
    directions = exact.principal(start)
    vectors = torch.linalg.eigh(moment)[1]
    assert quality.overlap(directions["a"], vectors[:, -4:]) > 1 - 1e-9
    assert directions["a"] is directions["b"], "an input that layers share is decomposed once"


def test_alternations_are_loftqs():
    start = given()
    objective = exact.alternated(start)["a"]
    plain = float((start.weights["a"] - exact.Quantizer().roundtrip(start.weights["a"])).norm())
    assert 0 < objective < plain


def test_expected_seconds_follow_the_shapes():
    assert exact.expected("svd", [(10, 100), (100, 10)], RATES) == pytest.approx(2e4 / RATES.svd)
    assert exact.expected("alternation", [(10, 10)], RATES) == pytest.approx(5e3 / RATES.svd)


@pytest.mark.parametrize("method", METHODS)
def test_floors(method):
    one = floors.cost(method, 64, 32, 4)
    assert one.bytes > 0
    two = floors.floor(method, [(64, 32)] * 2, 4, RATES)
    assert two == pytest.approx(2 * one.seconds(RATES))
    assert floors.cost(method, 128, 64, 4).bytes > one.bytes


def test_floors_by_hand():
    assert floors.cost("olora", 10, 20, 2) == floors.Cost(
        bytes=4 * 200 + 4 * 400, float32=2 * 400 + 4 * 10 * 4 + 2 * 400
    )
    assert floors.cost("pissa_niter_4", 10, 20, 2).float32 == (10 + 1) * 2 * 400
    assert floors.cost("bottom", 20, 10, 2).float64 == 2000 + 1000 / 3 + 8 * 2 * 200
    assert floors.Cost(1e10, 1e11, 5e10).seconds(RATES) == 2.0
    assert floors.Cost(3e10, 1e11).seconds(RATES) == 3.0


def test_rates(in_process):
    found = rates.measure_rates(CPU)
    assert min(found.bandwidth, found.float32, found.float64, found.svd) > 0
    assert "GB/s copied" in str(found)


def test_excess_is_that_of_a_known_matrix():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0])).double()
    second = torch.zeros(3, 3).double()
    second[1, 1] = 4.0
    found = quality.excess(weight, second, torch.eye(3).double()[:, :1])
    assert found == pytest.approx(34**0.5 / 5 - 1)  # sqrt(5² + 3²) is left, sqrt(4² + 3²) is best


def test_overlap_and_difference():
    axes = torch.eye(4)
    assert quality.overlap(axes[:, :2] @ torch.randn(2, 2), axes[:, :2]) == pytest.approx(1.0)
    assert quality.overlap(axes[:, :2], axes[:, 1:3]) == pytest.approx(0.5)
    assert quality.overlap(axes[:, 2:], axes[:, :2]) == pytest.approx(0.0)
    assert quality.difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1


def test_references_of_a_model_that_is_not_synthetic(arena):
    made = arena("decoder")
    made.provisions.calibrate(made.request(2, "corda_kpm"))
    truths = made.provisions.references
    name = truths.judged[0]
    left = torch.linalg.svd(truths.weight(name), full_matrices=False)[0]
    assert quality.overlap(truths.of_weight(name).last, left[:, -2:]) > 1 - 1e-9
    product = truths.weight(name) @ truths.second_moment(name, lifted=False)
    left = torch.linalg.svd(product, full_matrices=False)[0]
    assert quality.overlap(truths.of_product(name, lifted=False).first, left[:, :2]) > 1 - 1e-9
    assert truths.directions(name).shape[1] == 4
    assert truths.directions(name) is truths.directions(name)


def test_what_is_known_of_the_same_inputs_stays_known(arena):
    """For another strategy, and another rank: not where other inputs are read."""
    made = arena("layer")
    made.provisions.collecting = ["corda_ipm", "corda_kpm", "eva"]
    made.provisions.calibrate(made.request(2, "corda_ipm"))
    truths = made.provisions.references
    name = truths.judged[0]
    product, first = truths.product(name), truths.of_product(name, lifted=False)
    directions = truths.directions(name)
    made.provisions.calibrate(made.request(4, "eva"))
    assert truths.product(name) is product
    assert truths.of_product(name, lifted=False) is first
    assert truths.directions(name) is directions
    made.provisions.calibrate(made.request(2, "corda_kpm"))  # sums in float64
    assert truths.directions(name) is not directions
    assert truths.of_product(name, lifted=False) is not first


def test_the_reference_of_an_alternation(arena):
    """By first triplets alone it is what whole decompositions give."""
    made = arena("decoder")
    plan = made.provisions.plan(made.request(2, "loftq"))
    objectives = exact.alternated(made.provisions.given(made.request(2, "loftq"), plan))
    truths = made.provisions.references
    for name in truths.judged:
        assert truths.alternated(name, 2) == pytest.approx(objectives[name], rel=1e-3)


def test_what_is_too_dear_has_no_reference(arena, monkeypatch):
    monkeypatch.setattr(references, "TOO_DEAR", {"cpu": 1})
    made = arena("decoder")
    made.provisions.calibrate(made.request(2, "eva"))
    truths = made.provisions.references
    name = truths.judged[0]
    assert truths.of_weight(name) is None
    assert truths.of_product(name, lifted=True) is None
    assert truths.directions(name) is None
    layer = LayerFactors(torch.zeros(2, 32), torch.zeros(32, 2), 1.0, torch.zeros(32, 32))
    for measures in judging.MEASURES.values():
        for figure, measure in measures.items():
            if figure != "difference":
                assert measure(name, layer, truths, {}) is None


def test_a_gpu_is_not_asked_for_decompositions_that_take_minutes():
    subject = SimpleNamespace(device=torch.device("cuda"))
    truths = references.References(subject, [], 2)
    square, tall = (torch.empty(rows, 4096, device="meta") for rows in (4096, 11008))
    assert truths._decomposed(tall) is None
    assert truths._decomposed(square) is not None


def test_the_bandwidth_is_that_of_data(monkeypatch):
    """A GPU copies zeros faster."""
    sinks, empty_like = [], torch.empty_like
    monkeypatch.setattr(rates, "STREAM_BYTES", 2**21)
    monkeypatch.setattr(rates, "PRODUCT_SIZE", {"cpu": 8})
    monkeypatch.setattr(rates, "DECOMPOSED", 8)
    monkeypatch.setattr(torch, "empty_like", lambda x: sinks.append(empty_like(x)) or sinks[-1])
    rates.measure_rates(CPU)
    assert len(sinks[0].unique()) == 256


def test_judged_layers_are_spread():
    targets = [
        references.Target(f"{kind}.{i}", "Linear", shape, "float32", 2, 2.0, 1.0)
        for i in range(30)
        for kind, shape in (("small", (4, 4)), ("large", (4096, 4096)))
    ]
    small = [f"small.{i}" for i in (0, 10, 19, 29)]
    assert references.spread(targets) == [*small, "large.0"]


def test_the_lift_is_cordas():
    from lora_init.initializers import corda

    assert references.CORDA_LIFT == corda.NULL_SPACE_LIFT
