"""Run `python -m experiments.papers.corda_compression`."""

from ..application import run
from . import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
