from experiments.papers.corda_compression import PAPER
from experiments.papers.running import run

run(PAPER)
