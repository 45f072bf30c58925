"""`pytest -p tests.emulated.plugin`: the tests of this folder, and whatever else is named, on the emulated GPU; without a compiler they are left out."""

from __future__ import annotations

from benchmarks import emulated_cuda

if not emulated_cuda.lacks():
    emulated_cuda.start()
