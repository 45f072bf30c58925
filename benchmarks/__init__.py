"""The harness behind the figures in the README; each run leaves one file in `results/`."""
