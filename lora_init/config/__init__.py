"""`LoraConfig` and the `adapter_config.json` file."""
