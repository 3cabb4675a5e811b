"""Every method on a live Hugging Face PEFT model, for those who train with Trainer or TRL.

    peft_model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules="all-linear"))
    initialize_peft_model(peft_model, "pissa")     # before the optimizer is built
    Trainer(peft_model, …).train()
    peft_model.save_pretrained("adapter")          # for the original base, like any LoRA adapter

The layers stay PEFT's, and so does the forward pass, ``base(x) + s B A x``. That sets the limits:

- **subtracting methods** (pissa, olora, corda) edit the base weight: PEFT's layers cannot subtract
  s B0 A0 in the forward pass. Float32 is as good as exact; a 16-bit base is rounded, a quantised
  one quantised anew, and the report says what that costs at step 0. `lora_init.get_peft_model`
  has neither error.
- **tied weights** (a head that is the embedding) are refused under every method that changes the
  base, because there is only one weight to change.

What a changed base would silently spoil in PEFT is put right while it lasts:

- `save_pretrained`, which Trainer calls for its checkpoints too, writes the adapter for the
  **original** base, at rank 2r: PEFT, vLLM and anyone load it. `load_adapter`, which Trainer
  resumes by, takes it apart again. In a new process `load_peft_checkpoint`, or the same call of
  `initialize_peft_model`, comes first; without it, resuming fails by the tensors' shapes. No
  callback is needed.
- `disable_adapter` computes the original function (TRL's reference model): s B0 A0 is added back.
  Not on a replaced base, nor for the rows of ``adapter_names="__base__"``.
- `unload` and `delete_adapter` put the original base back first.

Nothing here imports PEFT: its layers are known by their classes.
"""

from lora_init.under_peft.applying import restore_peft_model
from lora_init.under_peft.initializing import initialize_peft_model
from lora_init.under_peft.loading import load_peft_checkpoint
from lora_init.under_peft.saving import save_peft_model

__all__ = [
    "initialize_peft_model",
    "load_peft_checkpoint",
    "restore_peft_model",
    "save_peft_model",
]
