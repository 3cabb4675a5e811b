"""`python -m experiments.papers.loftq_iterations`."""

from experiments.papers.loftq_iterations import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
