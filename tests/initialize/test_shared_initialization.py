"""Two processes share the layers out between them: the adapter of one process, errors of all.

Nothing heavy is imported here, because each process imports this file.
"""

from datetime import timedelta

import pytest
import torch
from processes import run_ranks
from torch import distributed, nn

from lora_init import LoraConfig, get_peft_model
from lora_init.initialize import jobs as schedule
from lora_init.initialize import shared as sharing

NAMES = ["0", "2", "4"]
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_2": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": {"name": "loftq", "loftq_iter": 2}},
    "corda": {"init_lora_weights": "corda"},
    "eva": {"init_lora_weights": "eva"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 36)
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 40, generator=generator) for _ in range(4)]


def products(case, base, own):
    """s B A of every layer."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=NAMES, **CASES[case])
    adapted = get_peft_model(base, config, calibration=own)
    return {
        name: layer.scaling * (layer.lora_B @ layer.lora_A).detach()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A")
    }


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    computed = []
    original = schedule.run

    def counting(job_work, planned):
        computed.append(sum(len(job.targets) for job in planned))
        return original(job_work, planned)

    schedule.run = counting
    found = {}
    for case in CASES:
        computed.clear()
        found[case] = products(case, model(), batches()[rank::2])
        found[case, "computed"] = sum(computed)
    # Another model on each rank: nothing is shared, everyone has the adapter of its own weights.
    found["own"] = products("pissa", model(seed=rank), None)
    broken = model()
    if rank == 1:
        broken[4].weight.data[3, 3] = torch.nan
    try:
        products("pissa", broken, None)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_have_the_adapter_of_one_process(ranks, case):
    expected = products(case, model(), batches())
    for found in ranks:
        assert found[case].keys() == expected.keys()
        for name, product in expected.items():
            gap = (found[case][name] - product).norm()
            assert gap <= 1e-6 * model().get_submodule(name[-1]).weight.norm()
            assert torch.equal(found[case][name], ranks[0][case][name])


@pytest.mark.parametrize("case", CASES)
def test_no_layer_is_computed_twice(ranks, case):
    if case == "gaussian":  # draws are cheaper than messages
        assert [found[case, "computed"] for found in ranks] == [3, 3]
    else:
        assert sum(found[case, "computed"] for found in ranks) == len(ranks[0][case])


def test_ranks_with_other_weights_share_nothing(ranks):
    for rank, found in enumerate(ranks):
        for name, product in products("pissa", model(seed=rank), None).items():
            torch.testing.assert_close(found["own"][name], product)


def test_a_rank_alone_with_a_broken_weight_fails_alone(ranks):
    """Other weights, other work: the rank whose weights are whole is done."""
    assert "error" not in ranks[0]
    assert "NaN" in ranks[1]["error"]


@pytest.mark.wrong_types
def test_the_share_of_each_rank_is_even(monkeypatch):
    monkeypatch.setattr(sharing, "rank_count", lambda: 2)

    class Target:
        def __init__(self, size):
            self.shape = (size, 1)

    jobs = [schedule.Job((Target(size),), torch.device("cpu")) for size in (9, 5, 4, 3, 1)]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(sharing, "rank_number", lambda rank=rank: rank)
        shares.append([job.targets[0].shape[0] for job in sharing._share(jobs)])
    assert shares == [[9, 3], [5, 4, 1]]
