"""python -m experiments.papers.fast_svd"""

from experiments.papers.fast_svd import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
