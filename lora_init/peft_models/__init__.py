"""Every method on a live Hugging Face PEFT model, for training with Trainer or TRL.

    peft_model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules="all-linear"))
    initialize_peft_model(peft_model, "pissa")     # before the optimizer is built
    Trainer(peft_model, …).train()
    peft_model.save_pretrained("adapter")          # for the original base, like any LoRA adapter

The layers stay PEFT's. Subtracting methods (pissa, olora, corda) compute
``(W - s B0 A0) x + s B A x``:

- A float32 weight is edited, so the forward pass costs what PEFT's costs.
- 16-bit, quantized and tied weights are unchanged, and a hook on the base module subtracts
  s B0 A0 x. Step 0 is the base model there too, and so is a reference by `disable_adapter`.
  ``quantized_base="requantize"`` quantizes the residual instead.

A and B then do not fit the base alone. Until the model is restored, PEFT's methods and functions
know that:

- `save_pretrained`, `state_dict` and `get_peft_model_state_dict` describe the **original** base, at
  rank 2r: PEFT, vLLM and others load it. `load_adapter` and `load_state_dict` split it again.
  Trainer saves and resumes by these, without a callback. In a new process, call
  `load_peft_checkpoint` or `initialize_peft_model` first; otherwise the shapes do not fit.
- `disable_adapter` and the rows of ``adapter_names="__base__"`` compute the original function
  (not on a replaced base).
- `merge_adapter` and `merge_and_unload` merge s (B A - B0 A0).
- `unload` and `delete_adapter` restore the original base first.
- An adapter of weight c (PEFT's `set_scale`, diffusers' `set_adapters`) gives
  W + c s (B A - B0 A0).
- What would be wrong is refused by name: sums of adapters, hot-swapping, other adapters for the
  changed base, a second PEFT model around it, and whatever needs the base while it is merged.

A model can also hold PEFT's layers without a PeftModel, after `add_adapter` of transformers,
diffusers or sentence-transformers, or `inject_adapter_in_model`. `lora_init.peft_models.injected`
describes their functions.

Nothing here imports PEFT: its layers are recognized by their classes.
"""

from lora_init.peft_models.apply import restore_peft_model
from lora_init.peft_models.initialize import initialize_peft_model
from lora_init.peft_models.load import load_peft_checkpoint
from lora_init.peft_models.save import save_peft_model

__all__ = [
    "initialize_peft_model",
    "load_peft_checkpoint",
    "restore_peft_model",
    "save_peft_model",
]
