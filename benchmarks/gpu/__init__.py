"""The proof on a GPU: `python -m benchmarks.gpu`, which `docs/gpu.md` describes."""
