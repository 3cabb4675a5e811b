"""Run `python -m experiments.papers.corda_compression`."""

from experiments.papers.application import run
from experiments.papers.corda_compression import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
