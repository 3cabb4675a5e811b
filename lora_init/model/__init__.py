"""The model that `get_peft_model` returns."""
