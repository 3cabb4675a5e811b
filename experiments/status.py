"""The command `python -m experiments.status SWEEP [--watch | --json]`."""

import sys

from experiments.sweep.status.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
