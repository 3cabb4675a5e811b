"""python -m experiments.papers.corda_compression"""

from ..application import run
from . import PAPER

if __name__ == "__main__":
    run(PAPER)
