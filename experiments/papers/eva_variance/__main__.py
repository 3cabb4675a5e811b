"""python -m experiments.papers.eva_variance"""

from ..application import run
from . import PAPER

if __name__ == "__main__":
    run(PAPER)
