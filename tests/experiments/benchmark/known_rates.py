"""A machine whose rates are known, so that floors and expected seconds are known too."""

from experiments.benchmark.rates import Rates

RATES = Rates(bandwidth=1e10, float32=1e11, float64=5e10, svd=1e9)
