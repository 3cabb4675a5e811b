"""python -m experiments.papers.corda_knowledge"""

from experiments.papers.application import run
from experiments.papers.corda_knowledge import PAPER

if __name__ == "__main__":
    run(PAPER)
