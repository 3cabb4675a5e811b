"""Collect the statistics that data-driven initializers need from a pass over calibration data."""
