"""`python -m benchmarks.emulated_cuda compress recipe.yaml`: any command on the emulated GPU. PPCLC_EMULATED_BYTES: how much memory it has."""

import os

from benchmarks import emulated_cuda
from ppclc.cli import main

if __name__ == "__main__":
    emulated_cuda.start().limit(int(os.environ.get("PPCLC_EMULATED_BYTES", emulated_cuda.MEMORY)))
    main()
