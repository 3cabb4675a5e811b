"""python -m experiments.papers.pissa_quantization"""

from experiments.papers.pissa_quantization import PAPER
from experiments.papers.running import run

if __name__ == "__main__":
    run(PAPER)
