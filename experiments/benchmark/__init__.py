"""Compare the cost of lora_init with Hugging Face PEFT and with plain `torch.linalg`.

    python -m experiments.benchmark
    python -m experiments.benchmark model=smollm2 sections=[steps]
    python -m experiments.benchmark model=llama2_7b_shapes device=cuda

Each section is one module with a function `cases(settings)`. It returns the cases in their order;
a case measures one comparison and yields its rows:

- `initialization`: every method, with the error of its factors;
- `calibration`: the pass that collects second moments, compared with plain forward passes;
- `memory`: the peak of `get_peft_model`;
- `steps`: training steps of LoRA and DoRA;
- `experts`: training steps and starts of adapters on a mixture of experts.
- `sharded`: memory and time of starts on a base that several ranks share.

Contenders alternate within one process, so that a slow moment of the machine hits all of them.
A ratio is the peer's figure divided by ours: above 1, lora_init takes less.
"""
