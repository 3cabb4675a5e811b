"""lora_init beside Hugging Face PEFT: one run, one machine, quality beside the speed, as ratios.

    python -m experiments.benchmark
    python -m experiments.benchmark sections=[steps] steps.models=[minilm] device=cuda
    python -m experiments.benchmark model=llama2_7b_shapes device=cuda

A section is one file with a function `run(settings, hear, clock) -> list[Row]` that tells each row
as soon as it is known:

- `initialization`: every strategy on every model beside PEFT and torch.linalg, its time, peak and
  floor, and what it computed;
- `calibration`: the pass that collects second moments, against plain forward passes;
- `injection`: `get_peft_model` where the initialization itself costs next to nothing;
- `memory`: the peak of an injection above the loaded model;
- `steps`: a training step of LoRA and of DoRA; ten minutes, so it is run when asked for.

A ratio is the peer's figure over ours: above 1 ours takes less. Contenders take turns within one
process, in an order that favours neither, and the ratios are taken within each turn: what slows
the machine down for a moment slows both. The library's cache is off: everything is computed.
The whole of it ends within `seconds`, at the cost of turns and of dear peers (`clock.py`).
"""
