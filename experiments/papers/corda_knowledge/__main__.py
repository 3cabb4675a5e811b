"""Run `python -m experiments.papers.corda_knowledge`."""

from experiments.papers.application import run
from experiments.papers.corda_knowledge import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
