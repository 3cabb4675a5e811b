"""The initialization methods, one file each; `lora_init.registry` imports them all."""
