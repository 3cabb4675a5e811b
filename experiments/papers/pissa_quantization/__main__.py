"""python -m experiments.papers.pissa_quantization"""

from experiments.papers.pissa_quantization import PAPER
from experiments.papers.application import run

if __name__ == "__main__":
    run(PAPER)
