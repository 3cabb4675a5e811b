"""python -m experiments.papers.rate_scaling"""

from experiments.papers.rate_scaling import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
