"""python -m experiments.papers.sharpness"""

from experiments.papers.running import run
from experiments.papers.sharpness import PAPER

if __name__ == "__main__":
    run(PAPER)
