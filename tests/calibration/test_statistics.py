"""The calibration pass: exact moments, masks, sharing, reuse, and a model left as it was."""

import models
import pytest
import torch
from measures import assert_unchanged, relative_gap, snapshot
from models import token_batches
from torch import nn

from lora_init import Calibration, LoraConfig, calibrate, get_peft_model
from lora_init.calibration.collect import collect
from lora_init.calibration.memory import statistics_of
from lora_init.calibration.sums import RunningMoments
from lora_init.registry import CalibrationRequest

PLAIN = CalibrationRequest()


class Record:
    """Every input of a module, as the module saw it: the reference that hooks are held against."""

    def __init__(self, model, names):
        self.inputs = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self.inputs[name].append(args[0].clone())
            )

    def moments(self, name, masks=None):
        rows = [
            (x if masks is None else x[mask]).reshape(-1, x.shape[-1]).double()
            for x, mask in zip(self.inputs[name], masks or self.inputs[name], strict=True)
        ]
        x = torch.cat(rows)
        return x.T @ x / len(x), x.mean(0), len(x)


def agrees(statistics, reference):
    second_moment, mean, tokens = reference
    inputs = statistics.inputs
    assert inputs.tokens == tokens
    error = torch.linalg.matrix_norm(inputs.second_moment - second_moment)
    assert error <= 1e-5 * torch.linalg.matrix_norm(second_moment)
    torch.testing.assert_close(inputs.mean.double(), mean, rtol=1e-4, atol=1e-5)
    return True


# -- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 77, 512, 3000])
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3], ids=["centred", "shifted", "far from zero"])
def test_sums_of_any_batch_size_are_those_of_float64(batch, mean):
    """To 1e-5 of the diagonal's scale, however far the mean is from zero."""
    generator = torch.Generator().manual_seed(batch)
    spread = torch.randn(150, 150, generator=generator) * torch.logspace(-2, 0, 150)
    rows = torch.randn(2400, 150, generator=generator) @ spread
    rows += mean * torch.randn(150, generator=generator)
    sums = RunningMoments(150, torch.device("cpu"))
    for part in rows.split(batch):
        sums.add(part)
    x = rows.double()
    covariance = x.T.cov(correction=0)
    scale = covariance.diagonal().mean()
    found = sums.moments
    assert found.tokens == 2400
    assert (found.products - covariance).abs().max() <= 1e-5 * scale
    assert (found.mean - x.mean(0)).abs().max() <= 1e-5 * scale.sqrt()
    statistics = statistics_of(found)
    second_moment = x.T @ x / len(x)
    gap = (statistics.second_moment - second_moment).abs().max()
    assert gap <= 1e-5 * second_moment.diagonal().mean()


def test_directions_of_least_variance_are_summed_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 30, generator=generator) * torch.logspace(-5, 0, 30) + 2
    request = CalibrationRequest(smallest=True)
    inputs = (
        collect(nn.Sequential(nn.Linear(30, 2)), ["0"], request, x.split(70)).layers["0"].inputs
    )
    expected = torch.linalg.eigvalsh(x.double().T.cov(correction=0))
    found = torch.linalg.eigvalsh(inputs.covariance)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_other_dtypes_are_summed_as_they_are(dtype):
    rows = (torch.randn(600, 20, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    kept = torch.arange(0, 600, 3)
    sums = RunningMoments(20, torch.device("cpu"))
    sums.add(rows, kept)
    covariance = rows[kept].double().T.cov(correction=0)
    assert (sums.moments.products - covariance).abs().max() <= 1e-5


# -- the pass --------------------------------------------------------------------------------------


@pytest.fixture
def bert():
    return models.bert()


def padded_batches(count=3, length=9, **fields):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(count):
        ids = torch.randint(0, 50, (4, length + index), generator=generator)
        lengths = torch.randint(2, length, (4,), generator=generator)
        mask = (torch.arange(length + index) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, **fields})
    return batches


def test_moments_of_unmasked_tokens_over_batches_of_any_size(bert):
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    batches = padded_batches()
    record = Record(bert, names)
    calibration = collect(bert, names, PLAIN, iter(batches))
    masks = [batch["attention_mask"].bool() for batch in batches]
    for name in names:
        assert agrees(calibration.layers[name], record.moments(name, masks))
    assert calibration.tokens == sum(int(mask.sum()) for mask in masks)
    assert calibration.batches == 3


def test_an_input_of_another_shape_counts_every_row(bert):
    names = ["bert.pooler.dense"]
    record = Record(bert, names)
    calibration = collect(bert, names, PLAIN, padded_batches())
    assert agrees(calibration.layers[names[0]], record.moments(names[0]))


def test_token_labels_are_left_out_where_the_method_says_so():
    model = models.llama()
    names = ["model.layers.0.self_attn.q_proj"]
    batches = padded_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 3 == 0, -100)
    record = Record(model, names)
    calibration = collect(model, names, CalibrationRequest(ignore_label=-100), batches)
    masks = [b["attention_mask"].bool() & (b["labels"] != -100) for b in batches]
    assert agrees(calibration.layers[names[0]], record.moments(names[0], masks))
    everything = collect(model, names, PLAIN, batches).layers[names[0]].inputs
    assert everything.tokens > calibration.layers[names[0]].inputs.tokens


def test_encoder_and_decoder_use_their_own_masks():
    model = models.t5()
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.k",
    ]
    # Equal lengths on both sides: shapes alone could not tell the masks apart.
    batch = padded_batches(count=1)[0]
    encoder_mask = batch["attention_mask"].bool()
    decoder_mask = encoder_mask.flip(0)
    labels = torch.randint(0, 50, encoder_mask.shape)
    labels[:, -4:] = -100
    batch |= {"decoder_attention_mask": decoder_mask.long(), "labels": labels}
    record = Record(model, names)
    calibration = collect(model, names, CalibrationRequest(ignore_label=-100), [batch])
    decoder_rows = decoder_mask & (labels != -100)
    for name, mask in zip(
        names, (encoder_mask, decoder_rows, decoder_rows, encoder_mask), strict=True
    ):
        assert agrees(calibration.layers[name], record.moments(name, [mask])), name


class Moody(nn.Module):
    """Two layers that share their input in some batches only, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, split):
        self.a(x)
        self.b(x * 2 if split else x)
        self.twice(x)
        self.twice(x)


def test_sharing_that_changes_between_batches_is_summed_correctly():
    torch.manual_seed(0)
    model = Moody()
    batches = [[torch.randn(3, 4), split] for split in (False, True, False)]
    record = Record(model, ["a", "b", "twice"])
    layers = collect(model, ["a", "b", "twice"], PLAIN, batches).layers
    for name in ("a", "b", "twice"):
        assert agrees(layers[name], record.moments(name))
    assert layers["a"].inputs is not layers["b"].inputs


def test_the_model_is_left_as_it_was(bert):
    bert.train()
    bert.bert.pooler.eval()
    before = {name: module.training for name, module in bert.named_modules()}
    state = {key: value.clone() for key, value in bert.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in bert.modules())
    collect(bert, ["bert.pooler.dense"], PLAIN, padded_batches())
    assert {name: module.training for name, module in bert.named_modules()} == before
    assert sum(len(module._forward_pre_hooks) for module in bert.modules()) == hooks
    assert all(torch.equal(value, state[key]) for key, value in bert.state_dict().items())
    with pytest.raises(ValueError, match="input_ids"):
        collect(bert, ["bert.pooler.dense"], PLAIN, [{"no_such_argument": 1}])
    assert sum(len(module._forward_pre_hooks) for module in bert.modules()) == hooks
    assert bert.training


def test_an_endless_or_empty_or_unused_input_is_refused_by_name(bert):
    with pytest.raises(ValueError, match="gave no batch"):
        collect(bert, ["bert.pooler.dense"], PLAIN, iter([]))
    bert.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"no token reached the target 'unused'.*exclude_modules"):
        collect(bert, ["unused"], PLAIN, padded_batches())


def test_a_masked_position_may_hold_anything():
    model = nn.Sequential(nn.Linear(4, 4))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, attention_mask):
            return self.inner(x)

    x = torch.ones(1, 3, 4)
    x[0, 2] = float("nan")
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0]])}
    inputs = collect(Wrapper(), ["inner.0"], PLAIN, [batch]).layers["inner.0"].inputs
    assert torch.equal(inputs.second_moment, torch.ones(4, 4))


class Overwriting(nn.Module):
    """Inputs that are written to in place after they were read, and read again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        x = x.clone()
        y = self.first(x)
        self.second(x)
        x += 10 * y
        return self.third(x).add_(x.relu_())


def test_inputs_that_are_written_to_later_count_as_they_were_read():
    torch.manual_seed(0)
    model = Overwriting()
    names = ["first", "second", "third"]
    record = Record(model, names)
    inputs = []
    for name in names:  # before the record's hooks, which see what is left
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.append((name, args[0].clone()))
        )
    batches = [torch.randn(6, 5) for _ in range(3)]
    layers = collect(model, names, PLAIN, batches).layers
    for name in names:
        record.inputs[name] = [x for reader, x in inputs if reader == name]
        assert agrees(layers[name], record.moments(name))
    assert layers["first"].inputs is layers["second"].inputs


def test_layers_of_a_decoder_share_the_encoders_output_and_its_head_the_decoders_mask():
    model = models.t5()
    across = [
        f"decoder.block.{i}.layer.1.EncDecAttention.{part}" for i in range(2) for part in "kv"
    ]
    batch = padded_batches(count=1)[0]
    mask = batch["attention_mask"].flip(0)
    batch |= {"decoder_attention_mask": mask, "decoder_input_ids": batch["input_ids"]}
    record = Record(model, ["lm_head"])
    layers = collect(model, [*across, "lm_head"], PLAIN, [batch]).layers
    assert len({id(layers[name].inputs) for name in across}) == 1
    assert agrees(layers["lm_head"], record.moments("lm_head", [mask.bool()]))


# -- one pass for many -----------------------------------------------------------------------------

EVA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva")
CORDA = LoraConfig(r=8, target_modules=["q_proj", "o_proj"], init_lora_weights="corda")


def labelled_batches():
    return [
        batch | {"labels": batch["input_ids"].masked_fill(batch["input_ids"] % 3 == 0, -100)}
        for batch in token_batches()
    ]


class Reading(list):
    """Batches that count how often they are read."""

    times = 0

    def __iter__(self):
        self.times += 1
        return super().__iter__()


@pytest.mark.parametrize("batches", [token_batches(), labelled_batches()], ids=["plain", "labels"])
def test_one_pass_serves_methods_that_count_different_tokens(batches):
    data = Reading(batches)
    found = calibrate(models.llama(), [EVA, CORDA], data)
    assert data.times == 1
    for config in (EVA, CORDA):
        shared = get_peft_model(models.llama(), config, calibration=found)
        alone = get_peft_model(models.llama(), config, calibration=batches)
        report = shared.init_report()
        assert report.calibration_tokens == alone.init_report().calibration_tokens
        for name, layer in alone.layers.items():
            assert relative_gap(shared.layers[name].lora_A, layer.lora_A) <= 1e-6
    masked, plain = (
        found.requests[CalibrationRequest(label)]["model.layers.0.self_attn.q_proj"].inputs
        for label in (-100, None)
    )
    assert (masked is plain) == ("labels" not in batches[0])


def test_gradients_take_a_pass_of_their_own():
    data = Reading(labelled_batches())
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lora_ga")
    found = calibrate(models.llama(), [CORDA, config], data)
    assert data.times == 2
    get_peft_model(models.llama(), config, calibration=found)


def test_a_calibration_serves_every_rank_and_survives_a_file(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga")
    found = calibrate(models.llama(), [EVA, CORDA, config], labelled_batches())
    found.save(tmp_path / "found.safetensors")
    read = Calibration.load(tmp_path / "found.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["found.safetensors"]
    assert (read.tokens, read.batches, read.fingerprints) == (
        found.tokens, found.batches, found.fingerprints,
    )  # fmt: skip
    for rank in (2, 6):
        for settings in (EVA, CORDA, config):
            wanted = LoraConfig.from_dict(settings.to_dict() | {"r": rank})
            first, second = (
                get_peft_model(models.llama(), wanted, calibration=one) for one in (found, read)
            )
            for name, layer in first.layers.items():
                assert torch.equal(layer.lora_A, second.layers[name].lora_A)
    q, k = (read.requests[PLAIN][f"model.layers.0.self_attn.{n}_proj"] for n in "qo")
    assert q.inputs is not k.inputs


@pytest.mark.parametrize(
    ("config", "seed", "message"),
    [
        (EVA, 0, r"statistics for .*ignore_label=None.*and .*ignore_label=-100.* is needed"),
        (
            LoraConfig(target_modules=["k_proj"], init_lora_weights="corda"),
            0,
            "has no statistics of the target 'model.layers.0.self_attn.k_proj'",
        ),
        (CORDA, 1, "collected with another weight of 'model.layers.0.self_attn.q_proj'"),
    ],
    ids=["another method", "another layer", "another model"],
)
def test_a_calibration_of_something_else_is_refused(config, seed, message):
    found = calibrate(models.llama(), CORDA, token_batches())
    model = models.llama(seed=seed)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config, calibration=found)
    assert_unchanged(model, before)


def test_calibrating_for_methods_without_data_is_refused():
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"none of the configurations needs data .*'pissa'"):
        calibrate(models.llama(), config, token_batches())
