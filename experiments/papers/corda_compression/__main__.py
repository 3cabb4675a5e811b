"""python -m experiments.papers.corda_compression"""

from experiments.papers.corda_compression import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
