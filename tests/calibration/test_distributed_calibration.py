"""Calibration by two processes: each has batches of its own, both get what one gets from all.

The processes are started once; each runs every case and leaves what it found in a file.
"""

from datetime import timedelta

import pytest
import torch
from measures import relative_gap
from models import llama, token_batches
from processes import run_ranks
from torch import distributed, nn

from lora_init import LoraConfig, calibrate, get_peft_model
from lora_init.calibration.collect import collect
from lora_init.linalg.moments import sums_bytes
from lora_init.registry import CalibrationRequest

pytestmark = pytest.mark.sampled(3)

WORLD = 2
BATCHES = token_batches(count=5, size=6)
SHARES = {"uneven": (slice(0, 2), slice(2, 5)), "one has none": (slice(0, 5), slice(0, 0))}
METHODS = {
    "corda": {"init_lora_weights": "corda"},
    "kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
}
LIMITS = {
    "unlimited": {},
    # Room for the widest input and one more.
    "in passes": {"calibration_memory": sum(sums_bytes(n, torch.float32) for n in (96, 32))},
}


def adapted(method, batches, **limits):
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **METHODS[method])
    return get_peft_model(llama(), config, calibration=batches, **limits)


def factors(model):
    """s B A of every layer, or A where B is zero; and what the report counts."""
    found = {"tokens": model.init_report().calibration_tokens}
    for name, layer in model.layers.items():
        lora_A, lora_B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        found[name] = layer.scaling * lora_B @ lora_A if lora_B.any() else lora_A
    return found


class Experts(nn.Module):
    """A layer that every input reaches, and one for each sign of its first entry."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.all, self.plus, self.minus = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        self.all(x)
        return (self.plus if x[0, 0] > 0 else self.minus)(x)


def signed_inputs():
    """Rank 0 has none with a negative sign; means differ far more than the rows of a batch."""
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(40, 6, generator=generator) + 20 * k for k in range(3)]
    for number, rows in enumerate(x):
        rows[0, 0] = 1.0 if number < 2 else -1.0
    return x


def experts(batches):
    layers = collect(Experts(), ["all", "plus", "minus"], CalibrationRequest(), batches).layers
    return {name: (s.inputs.covariance, s.inputs.mean) for name, s in layers.items()}


def failing(rank):
    """Rank 1 breaks off after its first batch; rank 0's data are sound."""
    yield BATCHES[0]
    if rank == 1:
        raise OSError("the disk is full")
    yield BATCHES[1]


def refusal(call):
    try:
        call()
    except (RuntimeError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def broken(x):
    """Data with a value that is not finite."""
    x = x.clone()
    x[1, 1] = float("inf")
    return x


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = {
        (method, "unlimited", share): factors(adapted(method, BATCHES[parts[rank]]))
        for method in METHODS
        for share, parts in SHARES.items()
    }
    for method, limit in (("corda", "in passes"), ("eva", "in passes")):
        own = BATCHES[SHARES["uneven"][rank]]
        found[method, limit, "uneven"] = factors(adapted(method, own, **LIMITS[limit]))
    config = LoraConfig(target_modules=["q_proj"], **METHODS["eva"])
    found["calibrate"] = calibrate(llama(), config, BATCHES[SHARES["uneven"][rank]]).batches
    x = signed_inputs()
    found["experts"] = experts(x[:2] if rank == 0 else x[2:])
    nowhere = lambda: experts([x[0]])  # noqa: E731
    once = lambda batches: adapted("corda", iter(batches), **LIMITS["in passes"])  # noqa: E731
    found["refused"] = {
        "failing": refusal(lambda: adapted("corda", failing(rank))),
        "without data": refusal(lambda: adapted("corda", [])),
        "never reached": refusal(nowhere),
        "not finite": refusal(lambda: experts([x[0], broken(x[2]) if rank else x[2]])),
        "read once": refusal(lambda: once(BATCHES) if rank else adapted(
            "corda", BATCHES, **LIMITS["in passes"])),
    }  # fmt: skip
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found, in order of their rank."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(work, folder, WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_gets_what_one_process_gets_from_all_batches(found, method, share):
    assert_same(found, (method, "unlimited", share), factors(adapted(method, BATCHES)))


@pytest.mark.parametrize(("method", "limit"), [("corda", "in passes"), ("eva", "in passes")])
def test_within_limits_too(found, method, limit):
    expected = factors(adapted(method, BATCHES, **LIMITS[limit]))
    assert_same(found, (method, limit, "uneven"), expected)


def assert_same(found, case, expected):
    for one in found:
        assert one[case].keys() == expected.keys()  # tokens, and layers with a rank above 0
        assert one[case]["tokens"] == expected["tokens"]
        for name in expected.keys() - {"tokens"}:
            assert relative_gap(one[case][name], expected[name]) <= 1e-6, name
            assert torch.equal(one[case][name], found[0][case][name])


def test_batches_are_those_of_all_ranks(found):
    assert [one["calibrate"] for one in found] == [len(BATCHES)] * WORLD


def test_groups_with_different_means_and_layers_that_one_rank_never_reached(found):
    x = torch.cat(signed_inputs()).double()
    reads = {"all": x, "plus": x[:80], "minus": x[80:]}
    for one in found:
        for name, rows in reads.items():
            covariance, mean = one["experts"][name]
            centred = rows - rows.mean(0)
            assert relative_gap(covariance, centred.T @ centred / len(rows)) <= 1e-6
            assert relative_gap(mean, rows.mean(0)) <= 1e-6


def test_an_error_of_one_rank_is_one_of_all(found):
    first, second = (one["refused"] for one in found)
    assert first["failing"] == (
        "RuntimeError: calibration: rank 1 failed with OSError: the disk is full"
    )
    assert second["failing"] == "OSError: the disk is full"
    assert "gave no batch" in first["without data"]
    assert "no token reached the target 'minus'" in first["never reached"]
    assert "'all' are not finite" in first["not finite"]
    for case in ("without data", "never reached", "not finite"):
        assert second[case] == first[case]
    assert "rank 1 failed" in first["read once"]
    assert "pass a list or a loader" in second["read once"]
