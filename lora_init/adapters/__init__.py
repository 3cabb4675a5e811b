"""Save and load adapters in PEFT's file format, without loss and without pickles.

A folder holds `adapter_config.json` and one safetensors file. The file depends on the method:

- **The method keeps the base weights**: `adapter_model.safetensors` holds the factors, as in PEFT.
- **The method trains a core R between A and B**: the file holds A and B R, a plain adapter of the
  same rank. `lora_init_core.safetensors` holds B and R, so that lora_init can continue training.
- **The method subtracts from the base weights**: the file fits the *original* base, on which the
  trained model is ``W + s (B A - B0 A0)``. It holds A' = [A; A0] and B' = [B, -B0] of rank 2r.
  Alpha is doubled (or multiplied by sqrt 2 with rsLoRA), so the scaling is still s. PEFT, vLLM and
  others load it as a plain adapter, since `init_lora_weights` is true. The safetensors header
  records how to restore rank r, A0, B0 and the edited base, so lora_init can continue training.
- **The method replaces the base weights** (LoftQ, QPiSSA, a requantized residual): the change has
  full rank on the original base, which PEFT's format cannot express. The file
  `lora_init_adapter.safetensors` holds A, B and the recipe of the quantized base (see
  `lora_init.factors.Replacement`). PEFT does not find this name, so it raises instead of loading a
  wrong adapter. Convolutions with dilation or a padding mode use the same name, since PEFT's layers
  ignore both.

The file of diffusers is read and written too; see `lora_init.adapters.diffusers_format`.

Files of PEFT can be loaded too. For unconverted `pissa` and `olora` adapters, the same exact
decomposition restores the base. `pissa_niter_N`, `corda`, `astra` and `lora_ga` adapters raise an
error, since their initial factors depended on random numbers or on data.
"""

from lora_init.adapters.embeddings import put_rows
from lora_init.adapters.load import fill, read
from lora_init.adapters.loaded import LoadedAdapter
from lora_init.adapters.save import save_adapter

__all__ = ["LoadedAdapter", "fill", "put_rows", "read", "save_adapter"]
