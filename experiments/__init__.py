"""The applications: fair, repeatable comparisons of initializations, started through Hydra."""

import os

# OpenMP reads this when torch is loaded. By default its threads spin while they wait for each
# other, which slows a training step several times if another process uses the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
