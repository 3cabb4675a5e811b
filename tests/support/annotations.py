"""The checks of annotated types and shapes that are on in every test run."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Decorates every function of lora_init during the tests; an int is a float."""
