"""Run `python -m experiments.papers.loftq_iterations`."""

from experiments.papers.application import run
from experiments.papers.loftq_iterations import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
