"""Run `python -m experiments.papers.eva_variance`."""

from experiments.papers.application import run
from experiments.papers.eva_variance import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
