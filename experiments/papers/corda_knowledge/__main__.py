"""python -m experiments.papers.corda_knowledge"""

from ..application import run
from . import PAPER

if __name__ == "__main__":
    run(PAPER)
