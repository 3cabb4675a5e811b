"""Run `python -m experiments.papers.loftq_iterations`."""

from ..application import run
from . import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
