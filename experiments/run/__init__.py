"""One run: from its configuration to `result.json` in its folder."""
