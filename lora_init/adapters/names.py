"""Names in adapter files, shared by the writer and the reader."""

WEIGHTS_NAME = "adapter_model.safetensors"
OWN_WEIGHTS_NAME = "lora_init_adapter.safetensors"
PREFIX = "base_model.model."
HEADER_KEY = "lora_init"
