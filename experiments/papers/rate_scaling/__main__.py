"""python -m experiments.papers.rate_scaling"""

from experiments.papers.rate_scaling import PAPER
from experiments.papers.running import run

if __name__ == "__main__":
    run(PAPER)
