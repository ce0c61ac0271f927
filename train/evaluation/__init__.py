"""Judging a checkpoint or a running server by files."""
