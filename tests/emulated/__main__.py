"""`python -m tests.emulated compress recipe.yaml`: any command on the emulated GPU. PPCLC_EMULATED_BYTES: how much memory it has."""

import os

from ppclc.cli import main
from tests import emulated

if __name__ == "__main__":
    emulated.start().limit(int(os.environ.get("PPCLC_EMULATED_BYTES", emulated.MEMORY)))
    main()
