"""Whole pipelines around students, and what goes beside them."""
