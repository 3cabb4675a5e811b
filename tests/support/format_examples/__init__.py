"""One small module of each weight format, for the suites that run over every format.

Each file of this folder defines `EXAMPLES`: by the name of a format, a function that makes a module
and its input. The name of a variant has a second word, as in "torchao int4".
"""

import importlib
import pkgutil

import torch

EXAMPLES = {}
for _file in pkgutil.iter_modules(__path__):
    EXAMPLES |= importlib.import_module(f"{__name__}.{_file.name}").EXAMPLES


def example(kind):
    """The same module and input at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EXAMPLES[kind]()
