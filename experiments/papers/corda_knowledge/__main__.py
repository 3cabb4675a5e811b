from experiments.papers.corda_knowledge import PAPER
from experiments.papers.running import run

run(PAPER)
