"""One pass over data that collects the statistics data-driven methods need."""
