"""The fuzzer takes what the tests of the experiments write."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
