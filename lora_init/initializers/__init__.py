"""One file per method. Every file here registers itself; there is no list to keep."""
