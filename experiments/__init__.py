"""The applications: fair, repeatable comparisons of initializations, started through Hydra."""

import logging
import os

# OpenMP reads this when torch is loaded. By default its threads spin while they wait for each
# other, which slows a training step several times if another process uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# transformers imports torchao where it is installed. torchao then logs which of its GPU kernels
# cannot be loaded, and a deprecation. No run here needs them.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
