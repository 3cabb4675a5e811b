"""Decide which modules get an adapter, with which rank and method, and check it before any work."""
