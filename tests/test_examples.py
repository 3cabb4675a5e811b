"""The reference's own usage examples, with only the import line and the model's name changed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import LoraModel


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_basic_lora_configuration(small_llama, capsys):
    from transformers import AutoModelForCausalLM

    from lora_init import LoraConfig, get_peft_model

    # Load the base model
    model = AutoModelForCausalLM.from_pretrained(small_llama)

    # Create a basic LoRA configuration
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
    )

    # Apply LoRA to the model
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()

    trainable = 2 * 16 * ((64 + 64) + (64 + 32))
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}\n"
    )
    ids = torch.arange(10)[None]
    assert model(input_ids=ids).logits.shape == (1, 10, 128)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 13)
    assert model.config.hidden_size == 64
    assert model.peft_config.base_model_name_or_path == small_llama


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """Every projection is 128 x 128, wide enough for r=64 and a multiple of 4-bit's blocks."""
    folder = tmp_path_factory.mktemp("wide_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_qlora_configuration_with_4_bit_quantization(wide_llama, capsys, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lora_init import LoraConfig, get_peft_model

    # Configure 4-bit quantization
    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )

    # Load quantized model
    model = AutoModelForCausalLM.from_pretrained(
        wide_llama,
        quantization_config=bnb_config,
        device_map="auto",
    )

    # Create LoRA config for QLoRA
    qlora_config = LoraConfig(
        r=64,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=0.1,
        bias="none",
    )

    # Apply LoRA adapters on top of the quantized model
    model = get_peft_model(model, qlora_config)
    model.print_trainable_parameters()

    trainable = 2 * 4 * 64 * (128 + 128)
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: ")
    assert {layer.module_type for layer in model.layers.values()} == {"Linear4bit"}
    assert {target.dtype for target in model.plan.targets} == {"nf4/64 double"}
    assert_learns(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        wide_llama, quantization_config=bnb_config, device_map="auto"
    )
    again = LoraModel.from_pretrained(again, tmp_path)
    ids = torch.arange(10)[None].to(model.device)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_dora_configuration(wide_llama, capsys):
    from transformers import AutoModelForCausalLM

    from lora_init import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(wide_llama)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    # Enable DoRA for weight-decomposed adaptation
    dora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
        use_dora=True,
        lora_dropout=0.05,
        bias="none",
    )

    model = get_peft_model(model, dora_config)
    model.print_trainable_parameters()

    trainable = 2 * 4 * (16 * (128 + 128) + 128)
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: ")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
    assert_learns(model)


def assert_learns(model):
    """A few steps, and every parameter that is trained has moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "method", [True, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "corda", "eva",
               "loftq"],
)  # fmt: skip
def test_a_training_step_of_every_named_strategy(small_llama, method):
    from transformers import AutoModelForCausalLM

    from lora_init import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(small_llama)
    ids = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    model = get_peft_model(model, config, calibration=[{"input_ids": ids}])
    assert_learns(model)
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)


def test_the_report_and_the_plan_are_tables(small_llama):
    from transformers import AutoModelForCausalLM

    from lora_init import LoraConfig, get_peft_model

    config = LoraConfig(r=4, init_lora_weights="pissa", rank_pattern={"v_proj": 2})
    model = AutoModelForCausalLM.from_pretrained(small_llama)
    plan = get_peft_model(model, config, dry_run=True)
    text = str(plan)
    assert "model.layers.0.self_attn.v_proj" in text
    assert "4 targets" in text
    model = get_peft_model(model, config)
    report = model.init_report()
    assert "captured energy" in str(report)
    for layer in report.layers:
        rank = 2 if "v_proj" in layer.name else 4
        assert layer.rank == rank
        # PiSSA: what it takes and what it leaves are complementary shares of the weight.
        assert layer.relative_norm**2 + layer.error**2 == pytest.approx(1, abs=1e-5)
        assert layer.captured_energy == pytest.approx(layer.relative_norm**2, rel=1e-4)
    assert plan.parameters == sum(
        layer.rank * (layer.out_features + layer.in_features) for layer in report.layers
    )


def test_a_checkpoint_holds_four_factors_and_continues(small_llama):
    from transformers import AutoModelForCausalLM

    from lora_init import LoraConfig, get_peft_model

    def build(seed=0):
        base = AutoModelForCausalLM.from_pretrained(small_llama)
        return get_peft_model(base, LoraConfig(r=4, init_lora_weights="olora"), seed=seed)

    model = build()
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_B.add_(0.1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    keys = {key.rsplit(".", 1)[-1] for key in state}
    assert keys == {"lora_A", "lora_B", "initial_lora_A", "initial_lora_B", "_extra_state"}
    other = build()
    other.load_state_dict(state)
    ids = torch.arange(10)[None]
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    name = next(key for key in state if key.endswith("initial_lora_A"))
    with pytest.raises(ValueError, match="is only in this model"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
