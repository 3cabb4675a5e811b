"""Real architectures, built small, with every registered initializer at its defaults."""

import copy

import pytest
import torch
from measures import assert_gap, train
from methods import behavior
from models import (
    VOCABULARY,
    Batches,
    ConvBlock,
    bert,
    data_of,
    gpt2,
    image_batches,
    llama,
    spread,
    t5,
    t5_batches,
    token_batches,
)
from products import thinned
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_init import LoraConfig, LoraModel, get_peft_model, list_initializers
from lora_init.plan.architectures import DEFAULT_TARGETS

pytestmark = pytest.mark.sampled(3)

METHODS = list_initializers()


def albert():
    """Four layers that share one set of modules."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=24, hidden_size=48, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=80, max_position_embeddings=64, num_labels=10,
    )  # fmt: skip
    return spread(AlbertForSequenceClassification(config)).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        image_size=16, patch_size=4, num_channels=3, num_labels=16,
    )  # fmt: skip
    return spread(ViTForImageClassification(config)).eval()


def whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=48, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80,
        decoder_ffn_dim=80, max_source_positions=12, max_target_positions=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return spread(WhisperForConditionalGeneration(config)).eval()


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return spread(MixtralForCausalLM(config)).eval()


def pictures():
    generator = torch.Generator().manual_seed(0)
    return Batches(
        {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(3)
    )


def speech():
    generator = torch.Generator().manual_seed(0)
    return Batches(
        {
            "input_features": torch.randn(4, 16, 24, generator=generator),
            "decoder_input_ids": torch.randint(1, VOCABULARY, (4, 7), generator=generator),
        }
        for _ in range(3)
    )


ALL = "all-linear"
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
ARCHITECTURES = {
    "llama": (llama, token_batches, None, 4),
    "gpt2": (gpt2, token_batches, None, 2),
    "bert": (bert, token_batches, None, 4),
    "albert": (albert, token_batches, ALL, 8),
    "t5": (t5, t5_batches, None, 12),
    "vit": (vit, pictures, ALL, 13),
    "whisper": (whisper, speech, ALL, 32),
    "mixtral": (mixtral, token_batches, None, 4),
    "convolutions": (ConvBlock, image_batches, CONVOLUTIONS, 4),
}


def output(model, batch):
    result = model(**batch)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.fixture(scope="module")
def case(request):
    """A model, its batches, the targets it is asked for, how many there are, and its output."""
    make, batches, targets, count = ARCHITECTURES[request.param]
    base, batches = make(), batches()
    with torch.no_grad():
        return base, batches, targets, count, output(base, batches[0])


def ratio(model):
    """max(1, ‖s B0 A0‖ / ‖W‖) over the layers."""
    if model.plan.initializer.base != "subtract":
        return 1.0
    return max(
        1.0,
        *(
            float(layer.initial_product().norm() / layer.original_weight().norm())
            for layer in model.layers.values()
        ),
    )


@pytest.mark.parametrize(
    ("case", "spec"),
    thinned(
        [
            pytest.param(architecture, spec, id=f"{architecture}-{spec.name}")
            for architecture in ARCHITECTURES
            for spec in METHODS
        ],
        lambda architecture, spec: behavior(spec.name),
        lambda architecture, spec: (architecture, spec.needs_data),
        lambda architecture, spec: (architecture, spec.base == "subtract"),
    ),
    indirect=["case"],
)
def test_every_method_supports_the_architecture(case, spec, tmp_path):
    original, batches, targets, count, expected = case
    base = copy.deepcopy(original)
    config = LoraConfig(target_modules=targets, init_lora_weights=spec.name)
    calibration = data_of(spec, batches)

    plan = get_peft_model(base, config, dry_run=True)
    assert len(plan.targets) == count
    model = get_peft_model(base, config, calibration=calibration, keep_original=True)
    assert model.layers.keys() <= {target.name for target in plan.targets}
    ranks = [layer.rank for layer in model.layers.values()]
    # GoRA bounds each rank; whoever else allocates keeps the sum.
    assert all(4 <= r <= 32 for r in ranks) if spec.name == "gora" else sum(ranks) == 8 * count

    # Step 0.
    started = output(model, batches[0])
    tolerance = 2e-5 * ratio(model)
    if spec.preserves_output:
        assert_gap(started, expected, tolerance)
    else:
        assert (started - expected).norm() > 1e-5 * expected.norm()

    # The gradient gets to every factor once none of them is zero.
    train(model)
    output(model, batches[0]).square().mean().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name

    # Off, saved and loaded, and gone.
    with torch.no_grad():
        trained = output(model, batches[0])
        with model.disable_adapter():
            assert_gap(output(model, batches[0]), expected, tolerance)
        model.save_pretrained(tmp_path)
        loaded = LoraModel.from_pretrained(copy.deepcopy(original), tmp_path)
        assert_gap(output(loaded, batches[0]), trained, 2 * tolerance)
        restored = model.unload()
        assert_gap(output(restored, batches[0]), expected, tolerance)
    assert restored is base
    for name, value in original.state_dict().items():
        assert (restored.state_dict()[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


def test_shared_layers_are_one_adapter():
    """ALBERT runs the same modules once a layer; their adapter runs as often."""
    model = get_peft_model(
        albert(), LoraConfig(target_modules=["query"], init_lora_weights="olora")
    )
    (name,) = model.layers
    calls = []
    model.layers[name].register_forward_hook(lambda *_: calls.append(1))
    output(model, token_batches(1)[0])
    assert len(calls) == 4


def test_a_patch_embedding():
    """ViT's is a convolution, which "all-linear" leaves out and its name does not."""
    base = vit()
    config = LoraConfig(target_modules=["projection", "q_proj"], init_lora_weights="pissa")
    expected = output(base, pictures()[0])
    model = get_peft_model(base, config)
    kinds = {layer.module_type for layer in model.layers.values()}
    assert kinds == {"Conv2d", "Linear"}
    assert_gap(output(model, pictures()[0]), expected, 2e-5 * ratio(model))


# -- target_modules=None ---------------------------------------------------------------------------


def peft_defaults():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_defaults_are_pefts_for_every_architecture():
    assert peft_defaults() == DEFAULT_TARGETS


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5, mixtral])
def test_defaults_are_pefts_layers(make):
    import peft

    # PEFT 0.21.2 loses Mixtral's defaults while it translates names of experts: named here.
    settings = {"target_modules": peft_defaults()["mixtral"]} if make is mixtral else {}
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings))
    names = [
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    ours = get_peft_model(make(), LoraConfig(), dry_run=True)
    assert [target.name for target in ours.targets] == names


# -- a mixture of experts --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["gate_up_proj"], ["q_proj", "experts.down_proj"]])
def test_expert_parameters_are_refused_for_what_they_are(names):
    shape = "4×96×64" if "gate_up_proj" in names else "4×64×48"
    message = (
        rf"{names[-1]!r} is not a module but a parameter, 'model.layers.0.mlp.experts.*' of shape "
        rf"{shape} in a MixtralExperts, the weights of all experts in one tensor.*name it in "
        "target_parameters"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(mixtral(), LoraConfig(target_modules=names))


@pytest.mark.parametrize("names", [["experts"], r".*\.experts"])
def test_the_experts_module_is_refused_for_what_it_holds(names):
    message = (
        r"'model.layers.0.mlp.experts' is a MixtralExperts \(parameters with all experts' "
        r"weights: gate_up_proj, down_proj\), which pissa does not support"
    )
    with pytest.raises(TypeError, match=message):
        get_peft_model(mixtral(), LoraConfig(target_modules=names, init_lora_weights="pissa"))


@pytest.mark.parametrize("experts", [None, True, False])
def test_all_linear_of_a_mixture_of_experts_has_its_experts_and_routers(experts):
    plan = get_peft_model(mixtral(), LoraConfig(target_modules=ALL, experts=experts), dry_run=True)
    fused = set() if experts is False else {"gate_up_proj", "down_proj", "gate"}
    assert {target.name.rpartition(".")[2] for target in plan.targets} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    } | fused  # fmt: skip
