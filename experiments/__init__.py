"""The applications: fair, repeatable comparisons of initializations, started through Hydra."""

import os

# OpenMP reads this when torch loads it, so it is set before. By default its threads spin while they
# wait for each other: with two threads and one busy neighbour on two cores a training step took
# 2-3.5 s, against 0.4-0.6 s when they sleep, and a comparison must not depend on its neighbours.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
