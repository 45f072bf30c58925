"""`pytest -p tests.emulated.plugin`: the tests of this folder, and whatever else is named, on the emulated GPU; without a compiler they are left out."""

from __future__ import annotations

from tests import emulated

if not emulated.lacks():
    emulated.start()
