"""The check of annotated types and shapes: `pytest --check-shapes`."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""What `pytest --check-shapes` decorates every function of lora_init with; an int is a float."""
