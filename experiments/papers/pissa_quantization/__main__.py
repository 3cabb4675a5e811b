"""Run `python -m experiments.papers.pissa_quantization`."""

from experiments.papers.application import run
from experiments.papers.pissa_quantization import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
