"""The command `lora-init`: list methods, plan and make adapters, inspect and convert files."""
