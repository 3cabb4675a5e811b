"""python -m experiments.papers.corda_knowledge"""

from experiments.papers.corda_knowledge import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
