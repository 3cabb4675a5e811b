"""python -m experiments.papers.sharpness"""

from experiments.papers.application import run
from experiments.papers.sharpness import PAPER

if __name__ == "__main__":
    run(PAPER)
