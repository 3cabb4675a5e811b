"""The plan, the report and one warning list the modules that a selection leaves out."""

import json
import warnings

import pytest
import torch
from measures import assert_gap
from mixtures import MIXTURES, STATE_SPACES, mixture
from models import bert, llama
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.plan.tables import grouped


def dry(model, targets, **settings):
    config = LoraConfig(**({"r": 2} | settings), target_modules=targets)
    return get_peft_model(model, config, dry_run=True)


def names(plan):
    return {each.name for each in plan.left_out}


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_names_experts_and_routers(kind):
    with pytest.warns(UserWarning, match=r"leaves out:[\s\S]*experts\.gate_up_proj") as caught:
        plan = dry(mixture(kind), "all-linear", experts=False)
    assert len([w for w in caught if "leaves out" in str(w.message)]) == 1
    last = "model.layers.1."
    router = "mlp.router" if kind == "gpt_oss" else "mlp.gate"
    assert {name for name in names(plan) if name.startswith(last)} == {
        last + part for part in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", router)
    }
    assert "experts.down_proj" in str(plan)
    kinds = {each.kind for each in plan.left_out} - {"experts"}
    assert len(kinds) == 1
    assert kinds.pop().lower().endswith("topkrouter")


PARTIAL = [
    (["down_proj"], {"down_proj"}),
    (["q_proj", "mlp.shared_expert.down_proj"], set()),
    (["gate_proj", "up_proj"], {"gate_up_proj"}),
    (["up_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
    (["q_proj", "v_proj"], set()),
    (r".*\.(gate|up|down)_proj", {"gate_up_proj", "down_proj"}),
    (r".*_proj", {"gate_up_proj", "down_proj"}),
    (r".*\.shared_expert\.\w+_proj", set()),
    (r".*\.self_attn\.\w_proj", set()),
]


@pytest.mark.parametrize(("targets", "parts"), PARTIAL)
def test_names_that_match_only_some_layers_give_a_warning(targets, parts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = dry(mixture("qwen2_moe"), targets)
    expected = {f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in parts}
    assert names(plan) == expected
    text = " ".join(str(w.message) for w in caught)
    for part in parts:
        assert f"mlp.experts.{part} (2)" in text
    assert ("leaves out" in text) == bool(parts)


def test_only_the_chosen_layers_are_named():
    plan = dry(mixture("qwen2_moe"), ["down_proj"], layers_to_transform=[1])
    assert names(plan) == {"model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    "exclude",
    [
        ["experts", "gate", "gate.weight"],
        r".*(experts|gate).*",
        ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
    ],
)
def test_what_the_user_excludes_is_not_named(exclude):
    assert names(dry(mixture("mixtral"), "all-linear", exclude_modules=exclude)) == set()


class Quantized(nn.Module):
    """A linear layer of a quantizer that is not supported."""

    def __init__(self, sizes=True):
        super().__init__()
        if sizes:
            self.in_features, self.out_features = 16, 8
        self.register_buffer("qweight", torch.zeros(2, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(4, 8))


class Shifted(nn.Linear):
    """A subclass of nn.Linear whose forward is not linear."""

    def forward(self, x):
        return super().forward(x).abs()


class Mixed(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.norm, self.table = nn.LayerNorm((4, 16)), nn.Embedding(5, 16)
        self.positions = nn.Parameter(torch.zeros(1, 4, 16))
        self.position_bias_table = nn.Parameter(torch.zeros(4, 16))
        self.convolution = nn.Conv1d(16, 16, 3)
        for name, layer in layers.items():
            self.add_module(name, layer)


@pytest.mark.parametrize(
    ("layer", "left_out"),
    [
        (Quantized(), {"odd"}),
        (Quantized(sizes=False), {"odd.qweight"}),
        (Shifted(16, 16), {"odd"}),
        (nn.MultiheadAttention(16, 2), {"odd.in_proj_weight"}),
        (nn.Bilinear(4, 4, 8), {"odd.weight"}),
        (nn.LSTM(16, 8), {"odd.weight_ih_l0", "odd.weight_hh_l0"}),
        (nn.Linear(16, 4), set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_linear_names_unknown_classes_and_nothing_else(layer, left_out):
    plan = dry(Mixed(odd=layer), "all-linear")
    assert names(plan) == left_out


def test_a_model_of_unknown_classes_alone_is_refused_with_their_names():
    with pytest.raises(ValueError, match="no linear module of a supported class.*'Quantized'"):
        dry(nn.Sequential(Quantized(), Quantized()), "all-linear")


def test_plain_models_leave_nothing_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model, settings in ((llama(), {}), (bert(), {"task_type": "SEQ_CLS"})):
            for targets in ("all-linear", ["query", "q_proj"], None):
                if targets == ["query", "q_proj"]:
                    targets = ["query"] if model.config.model_type == "bert" else ["q_proj"]
                assert dry(model, targets, **settings).left_out == ()


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"], ".*query", None])
def test_a_frozen_head_asks_for_a_task_type(targets):
    with pytest.warns(UserWarning, match="classifier: .*stays frozen.*task_type='SEQ_CLS'"):
        plan = dry(bert(), targets)
    assert names(plan) == {"classifier"}
    for settings in ({"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}):
        assert names(dry(bert(), targets, **settings)) == set()


def test_a_head_that_is_adapted_is_not_left_out():
    assert names(dry(bert(), ["query", "classifier"])) == set()


def test_the_report_has_what_the_plan_left_out():
    config = LoraConfig(r=2, target_modules="all-linear", experts=False)
    with pytest.warns(UserWarning, match="get_peft_model leaves out"):
        model = get_peft_model(mixture("mixtral"), config)
    report = model.init_report()
    assert tuple(report.left_out) == model.plan.left_out
    assert {each["name"] for each in json.loads(json.dumps(report.to_dict()))["left_out"]} == names(
        model.plan
    )
    assert "left out: model.layers.{0,1}.mlp.experts.gate_up_proj (2)" in str(report)


class Constant(nn.Module):
    """One layer reads inputs that vary; the other reads constant inputs."""

    def __init__(self):
        super().__init__()
        self.varied, self.fixed = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.varied(x) + self.fixed(torch.ones_like(x))


def test_layers_that_an_allocation_drops_are_in_the_report():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva")
    model = get_peft_model(Constant(), config, calibration=[torch.randn(20, 8)])
    assert list(model.layers) == ["varied"]
    assert names(model.plan) == {"fixed"}
    assert "left out: fixed: eva gave it no rank" in str(model.init_report())


@pytest.mark.parametrize("kind", STATE_SPACES)
def test_layers_that_a_mambas_kernel_reads_are_left_out_or_refused(kind):
    model = mixture(kind)
    outputs = {name for name, _ in model.named_modules() if name.endswith(".out_proj")}
    assert outputs
    plan = dry(model, "all-linear")
    inputs = [target.name for target in plan.targets if ".in_proj" in target.name]
    if kind == "qwen3_next":  # its kernels call the layer
        assert outputs <= {target.name for target in plan.targets}
        return
    assert inputs
    assert outputs <= names(plan)
    assert not outputs & {target.name for target in plan.targets}
    for layer in ("out_proj", "conv1d"):
        for targets in (["in_proj", layer], rf".*\.(in_proj|{layer})"):
            with pytest.raises(ValueError, match=rf"{layer}' is not supported: the fused kernel"):
                dry(model, targets)
    assert dry(model, ["in_proj"]).left_out == ()


class Narrow(nn.Module):
    """A square layer, a gate of one row and a head of three."""

    def __init__(self):
        super().__init__()
        self.square, self.gate, self.small = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x):
        return self.small(self.square(x) * self.gate(x).sigmoid())


DRAWING = ["kaiming", "gaussian", "random", "orthogonal", "init_ab", "init_ab_subtracted"]


@pytest.mark.parametrize("method", DRAWING)
@pytest.mark.parametrize("targets", ["all-linear", ["gate", "small"]])
def test_methods_that_draw_random_factors_allow_any_rank(method, targets, tmp_path):
    base, x = Narrow(), torch.randn(5, 16)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config = LoraConfig(r=8, target_modules=targets, init_lora_weights=method)
    model = get_peft_model(base, config)
    assert {"gate", "small"} <= model.layers.keys()
    assert model.plan.left_out == ()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    str(model.init_report())
    expected = model(x)
    model.save_pretrained(tmp_path)
    fresh = Narrow()
    fresh.load_state_dict(state)
    torch.testing.assert_close(LoraModel.from_pretrained(fresh, tmp_path)(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


@pytest.mark.parametrize("method", ["pissa", "olora", "milora", "loftq"])
def test_all_linear_skips_layers_too_narrow_for_a_decomposition(method):
    config = {"init_lora_weights": method, "r": 4}
    with pytest.warns(UserWarning, match=r"gate: .*cannot have rank 4 on a 1×16.*rank_pattern"):
        plan = dry(Narrow(), "all-linear", **config)
    assert [target.name for target in plan.targets] == ["square"]
    assert names(plan) == {"gate", "small"}
    plan = dry(Narrow(), "all-linear", rank_pattern={"gate": 1, "small": 3}, **config)
    assert [target.rank for target in plan.targets] == [4, 1, 3]


def test_a_narrow_layer_that_is_named_is_an_error():
    for targets, settings in (
        (["gate"], {}),
        (".*gate", {}),
        ("all-linear", {"rank_pattern": {"gate": 2}}),
    ):
        with pytest.raises(ValueError, match="'gate': rank .* exceeds min"):
            dry(Narrow(), targets, init_lora_weights="pissa", r=2, **settings)
    with pytest.raises(ValueError, match=r"leaves nothing to adapt .*cannot have rank 32"):
        dry(Narrow(), "all-linear", init_lora_weights="pissa", r=32)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], []),
        (["a.b"], ["a.b"]),
        ([f"l.{i}.w" for i in range(32)], ["l.{0..31}.w (32)"]),
        (["l.0.w", "l.2.w", "l.1.v"], ["l.{0,2}.w (2)", "l.1.v"]),
        (["l.0.e.0", "l.0.e.1", "l.0.e.2", "l.1.e.0"], ["l.{0,1}.e.{0..2} (4)"]),
        (["w.1", "w.1"], ["w.1"]),
    ],
)
def test_names_are_grouped_by_their_numbers(given, shown):
    assert grouped(given) == shown


class Attention(nn.Module):
    """An attention that reads a weight, and a layer whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.plain = nn.Linear(16, 16)

    def forward(self, x):
        return self.plain(self.normed(self.attention(x, x, x)[0]))


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_all_linear_skips_what_cannot_be_adapted(method):
    batches = [torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))]
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=method)
    with pytest.warns(UserWarning, match=r"normed: its weight is computed"):
        model = get_peft_model(Attention(), config, calibration=batches)
    observed = {"plain"} if method == "eva" else {"attention.out_proj", "plain"}
    assert model.layers.keys() == observed
    reasons = {each.name: each.reason for each in model.plan.left_out}
    assert ("attention.out_proj" in reasons) == (method == "eva")


def test_a_computed_weight_that_is_named_is_an_error():
    config = LoraConfig(r=2, target_modules=["normed"])
    with pytest.raises(TypeError, match=r"'normed': its weight is computed"):
        get_peft_model(Attention(), config)


def test_weights_that_rwkv_divides_in_place_are_named():
    def rwkv(every):
        config = RwkvConfig(
            vocab_size=32, hidden_size=16, attention_hidden_size=16, intermediate_size=24,
            num_hidden_layers=4, rescale_every=every,
        )  # fmt: skip
        torch.manual_seed(0)
        return RwkvForCausalLM(config)

    tokens = torch.arange(6)[None]
    everything = LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear")
    for every, count in ((2, 4), (0, 0)):
        plain = rwkv(every)
        with torch.no_grad():
            expected = {mode: plain.train(mode)(tokens).logits for mode in (True, False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(rwkv(every), everything)
        named = [row for row in model.init_report().left_out if "in place" in row.reason]
        assert len(named) == count
        with torch.no_grad():
            for mode, logits in expected.items():
                assert_gap(model.train(mode)(tokens).logits, logits, 1e-5)
    listed = LoraConfig(r=2, target_modules=["key", "value"])
    with pytest.raises(ValueError, match=r"blocks\.2\.feed_forward\.value'.*rescale_every=0"):
        get_peft_model(rwkv(2), listed)
