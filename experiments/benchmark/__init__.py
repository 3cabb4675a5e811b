"""lora_init beside Hugging Face PEFT: one run, one machine, quality beside the speed, as ratios.

    python -m experiments.benchmark
    python -m experiments.benchmark sections=[steps] steps.models=[minilm] device=cuda

A section is one file with a function `run(settings) -> list[Row]`:

- `steps`: a training step of LoRA and of DoRA;
- `injection`: `get_peft_model` where the initialization itself costs next to nothing;
- `memory`: the peak of an injection above the loaded model;
- `initialization`: every method that both have, its time and what it computed.

A ratio is PEFT's figure over ours: above 1 ours takes less. Contenders take turns within one
process, in an order that favours neither, and the ratios are taken within each turn: what slows
the machine down for a moment slows both.
"""
