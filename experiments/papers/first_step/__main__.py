"""python -m experiments.papers.first_step"""

from experiments.papers.first_step import PAPER
from experiments.papers.running import run

if __name__ == "__main__":
    run(PAPER)
