"""python -m experiments.papers.corda_compression"""

from experiments.papers.corda_compression import PAPER
from experiments.papers.running import run

if __name__ == "__main__":
    run(PAPER)
