"""What a user writes, with a type stated for each result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import lora_init
from lora_init import (
    Calibration,
    Factors,
    Initializer,
    InitReport,
    Layer,
    LoraConfig,
    LoraModel,
    Options,
    Plan,
    WithLoss,
    batched,
    calibrate,
    get_peft_model,
    init_factors,
    initialize_peft_model,
    list_initializers,
    register_initializer,
    reinitialize,
    restore_peft_model,
    save_peft_model,
)


@dataclass
class ScaledOptions(Options):
    size: float = 1.0


@register_initializer("scaled", options=ScaledOptions, base="subtract", reads=("weight", "inputs"))
@batched
def scaled(layer: Layer, options: ScaledOptions) -> Factors:
    moment: Tensor = layer.inputs.second_moment
    _, directions = torch.linalg.eigh(layer.gradient @ moment + layer.weight.mT @ layer.weight)
    noise = torch.randn(layer.shape[0], layer.rank, generator=layer.generator)
    return Factors(
        directions[..., : layer.rank].mT * options.size, noise, metrics={"size": options.size}
    )


def run(base: nn.Module, batches: list[Mapping[str, Tensor]], is_dry: bool) -> dict[str, Any]:
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights="pissa", lora_alpha=16)
    assert_type(config, LoraConfig)
    assert_type(get_peft_model(base, config, dry_run=True), Plan)
    assert_type(get_peft_model(base, config, calibration=batches, device="cuda"), LoraModel)
    assert_type(get_peft_model(base, config, dry_run=is_dry), LoraModel | Plan)
    plan = get_peft_model(base, config, dry_run=True, calibration_memory=2**30)
    print(plan.targets[0].name, plan.parameters, plan)

    found = calibrate(base, [config, LoraConfig(init_lora_weights={"name": "eva"})], batches)
    assert_type(found, Calibration)
    found.save("calibration.safetensors")
    model = get_peft_model(base, config, calibration=Calibration.load("calibration.safetensors"))
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters())
    for batch in batches:
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
    report = model.init_report()
    assert_type(report, InitReport)
    print(report, report.layers[0].name, model.config, model.generate(max_new_tokens=2))
    with model.disable_adapter():
        model(**batches[0])
    for name, layer in model.layers.items():
        print(name, layer.lora_A.shape, layer.initial_lora_B.norm(), layer.delta_weight().norm())
    model.save_pretrained("adapter")
    loaded = LoraModel.from_pretrained(base, "adapter", adapter_dtype=torch.bfloat16)
    assert_type(loaded, LoraModel)
    assert_type(reinitialize(loaded, config), LoraModel)
    assert_type(reinitialize(loaded, config, dry_run=True), Plan)
    assert_type(model.merge_and_unload(), nn.Module)

    factors = init_factors(torch.randn(8, 8), "olora", r=4, inputs=torch.randn(32, 8))
    assert_type(factors, Factors)
    assert_type(factors.lora_B @ factors.lora_A, Tensor)
    method = list_initializers("scaled")[0]
    assert_type(method, Initializer)
    assert_type(method.options(), Options)
    with_loss = WithLoss(batches, lambda model, batch: model(**batch).mean())
    get_peft_model(base, LoraConfig(init_lora_weights="lora_ga"), calibration=with_loss)

    assert_type(initialize_peft_model(base, config, calibration=batches), InitReport)
    save_peft_model(base, "adapter")
    restore_peft_model(base)
    print(lora_init.__version__)
    return report.to_dict()
