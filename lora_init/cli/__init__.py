"""The command `lora-init`: list and compare methods, make, inspect and convert adapters."""
