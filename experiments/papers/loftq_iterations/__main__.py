"""`python -m experiments.papers.loftq_iterations`."""

from experiments.papers.application import run
from experiments.papers.loftq_iterations import PAPER

if __name__ == "__main__":
    run(PAPER)
