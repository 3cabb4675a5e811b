"""The plan: which modules get an adapter, with which rank and method, checked before any work."""
