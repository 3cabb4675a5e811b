"""python -m experiments.papers.first_step"""

from experiments.papers.first_step import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
