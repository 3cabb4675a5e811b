"""python -m experiments.papers.first_step"""

from experiments.papers.application import run
from experiments.papers.first_step import PAPER

if __name__ == "__main__":
    run(PAPER)
