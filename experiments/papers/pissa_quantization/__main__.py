"""Run `python -m experiments.papers.pissa_quantization`."""

from ..application import run
from . import REPRODUCTION

if __name__ == "__main__":
    run(REPRODUCTION)
