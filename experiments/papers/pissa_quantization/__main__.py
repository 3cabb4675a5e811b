"""python -m experiments.papers.pissa_quantization"""

from ..application import run
from . import PAPER

if __name__ == "__main__":
    run(PAPER)
