"""Run `python -m experiments.papers.eva_variance`."""

from ..application import run
from . import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
