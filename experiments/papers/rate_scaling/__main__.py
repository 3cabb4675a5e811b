"""python -m experiments.papers.rate_scaling"""

from experiments.papers.application import run
from experiments.papers.rate_scaling import PAPER

if __name__ == "__main__":
    run(PAPER)
