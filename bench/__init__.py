"""Benchmarks: our side and the peers' in one run. `python -m bench --help`; what did not pay is in LOG.md."""
