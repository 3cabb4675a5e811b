"""`python -m experiments.papers.loftq_iterations`."""

from ..application import run
from . import PAPER

if __name__ == "__main__":
    run(PAPER)
