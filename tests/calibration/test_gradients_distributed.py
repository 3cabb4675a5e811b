"""Gradients over two processes: what one process finds that reads all batches; failures of all.

So are starts from several sets, from output moments and from sketches, those with a core, and those
of experts.
"""

from datetime import timedelta

import pytest
import torch
from expert_mixture import Mixture, mixture_rows
from measures import relative_gap
from processes import run_ranks
from torch import distributed, nn

from lora_init import LoraConfig, WithLoss, get_peft_model
from lora_init.calibration.collect import collect
from lora_init.registry import CalibrationRequest

NAMES = ["both", "first"]


class Branches(nn.Module):
    """Two layers, of which some batches reach one only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.first = nn.Linear(12, 8), nn.Linear(8, 6)

    def forward(self, x, further):
        x = torch.tanh(self.both(x))
        return self.first(x) if further else x


def shares():
    """The batches of each rank: three that reach both layers, and one that does not."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 12, generator=generator) for _ in range(4)]
    return [(x, True) for x in batches[:3]], [(batches[3], False)]


def mean_square(model, batch):
    return model(*batch).square().mean()


def no_scalar(model, batch):
    return model(*batch)


def gradients(batches, loss=mean_square):
    request = CalibrationRequest(gradients=True)
    found = collect(Branches(), NAMES, request, WithLoss(batches, loss))
    assert found.batches == 4
    return {name: layer.gradient for name, layer in found.layers.items()}


STARTS = {
    "sets": "sc_lora",
    "output moments": "lora_da",
    "core": "lora_sb",
    "core without data": "lora_xs",
    "sketches": "lora_one",
}


class Wide(nn.Module):
    """A layer whose gradient takes more memory than a sketch of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(48, 60)

    def forward(self, x):
        return torch.tanh(self.wide(x))


def wide_batches():
    generator = torch.Generator().manual_seed(2)
    scales = torch.arange(1, 49) ** -1.0
    return [scales * torch.randn(30 + 5 * n, 48, generator=generator) for n in range(4)]


def start(method, batches):
    """s B A and A of the layer, or with its core."""
    calibration = WithLoss(batches, lambda model, x: model(x).square().mean())
    memory = 4 * 48 * 60 - 1 if method == "lora_one" else None
    if method == "sc_lora":
        calibration = {"learn": batches, "keep": [x.flip(1) for x in batches]}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["wide"], init_lora_weights=method)
    model = get_peft_model(
        Wide(), config, calibration=calibration, calibration_memory=memory, cache=False
    )
    assert model.plan.sketches_gradients == (method == "lora_one")
    layer = model.layers["wide"]
    return {
        "A": layer.lora_A.detach(),
        "product": layer.scaling * layer.output_factor.detach() @ layer.lora_A.detach(),
    }


def expert_starts(batches):
    """A and s B A of experts."""
    config = LoraConfig(
        r=2,
        init_lora_weights={"name": "lora_da", "output_damping_ratio": 0.5},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    calibration = WithLoss(batches, lambda model, x: model(x).square().mean())
    layers = get_peft_model(Mixture(), config, calibration=calibration, cache=False).layers
    products = {name: layer.initial_product() for name, layer in layers.items()}
    return products | {f"{name} A": layer.lora_A.detach() for name, layer in layers.items()}


def expert_batches():
    """The router sends no row of the first batch to the first expert."""
    first, *others = mixture_rows(4, 60)
    model = Mixture()
    indices, _ = model.routing(model.entry(first))
    return [first[(indices != 0).all(-1)], *others]


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    own, wide = shares()[rank], wide_batches()
    wide = wide[:1] if rank == 0 else wide[1:]
    found = {"gradients": gradients(own)}
    found |= {case: start(method, wide) for case, method in STARTS.items()}
    found["experts"] = expert_starts(expert_batches()[:1] if rank == 0 else expert_batches()[1:])
    for case, batches, loss in (
        ("unreached", own if rank == 1 else [], mean_square),
        ("failed", own, mean_square if rank == 1 else no_scalar),
    ):
        try:
            gradients(batches, loss)
        except (ValueError, RuntimeError) as error:
            found[case] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_ranks_get_the_gradient_of_all_batches(found):
    first, second = shares()
    for name, expected in gradients([*first, *second]).items():
        actual = found[0]["gradients"][name]
        assert torch.equal(actual, found[1]["gradients"][name])
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_a_rank_without_batches_and_a_layer_that_no_rank_reaches(found):
    assert "no gradient reached the target 'first'" in found[0]["unreached"]
    assert found[0]["unreached"] == found[1]["unreached"]


def test_a_failure_of_one_rank_is_one_of_all(found):
    message = "ValueError: calibration: the loss of batch 1 is a Tensor of shape (5, 6)"
    assert found[0]["failed"].startswith(message)
    assert found[1]["failed"].startswith(f"RuntimeError: gradients: rank 0 failed with {message}")


@pytest.mark.parametrize("case", STARTS)
def test_ranks_get_the_start_of_all_batches(found, case):
    expected = start(STARTS[case], wide_batches())
    for name, wanted in expected.items():
        actual = found[0][case][name]
        assert torch.equal(actual, found[1][case][name])
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm()


def test_ranks_get_the_starts_of_experts_of_all_batches(found):
    for name, wanted in expert_starts(expert_batches()).items():
        actual = found[0]["experts"][name]
        assert torch.equal(actual, found[1]["experts"][name])
        assert relative_gap(actual, wanted) <= 1e-4
