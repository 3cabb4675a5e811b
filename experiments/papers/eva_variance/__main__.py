"""python -m experiments.papers.eva_variance"""

from experiments.papers.eva_variance import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
