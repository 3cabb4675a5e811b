"""`python -m experiments.papers.loftq_iterations`."""

from experiments.papers.loftq_iterations import PAPER
from experiments.papers.running import run

if __name__ == "__main__":
    run(PAPER)
