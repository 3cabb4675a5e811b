"""Adapter files: PEFT's format, in and out, lossless and never pickled.

A folder holds `adapter_config.json` and one safetensors file:

- **kept base**: PEFT's own `adapter_model.safetensors`, factors as they are.
- **subtracted base**: the same file, for the *original* base. There the trained model is
  ``W + s (B A - B0 A0)``, so what is written is A' = [A; A0], B' = [B, -B0] of rank 2r, with alpha
  doubled (times sqrt 2 under rsLoRA) so that the scaling is s again, and
  `init_lora_weights: true`, so that nobody runs an initialization on it. PEFT, vLLM and anyone load
  it as a plain adapter. The safetensors header tells us the split: our own reader restores rank r,
  A0, B0 and the subtracted base, trainable as before.
- **replaced base** (LoftQ, QPiSSA, a requantised residual): on the original base the change has
  full rank, which PEFT's format cannot express; `lora_init_adapter.safetensors` holds A, B and the
  recipe of the quantised base (see `lora_init.factors.Replacement`), under another name so that
  PEFT refuses the folder instead of loading something else. The same name serves convolutions with
  dilation or a padding mode, whose adapters PEFT's layers would compute without them.

Files of PEFT are read too. Unconverted `pissa` and `olora` adapters are rebuilt by the same exact
decomposition; `pissa_niter_N`, `corda` and `lora_ga` cannot be (their factors depended on a random
stream or on data), and are refused.
"""

from lora_init.adapters.embeddings import put_rows
from lora_init.adapters.load import fill, read
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.save import save_adapter

__all__ = ["LoadedAdapter", "fill", "put_rows", "read", "save_adapter"]
