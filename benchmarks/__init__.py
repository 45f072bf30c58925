"""The harness behind the figures in the README and in `docs/measured.md`; each run leaves one file in `results/`."""
