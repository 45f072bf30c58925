"""One run at a time in a folder: two would write the same drafts."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppclc.errors import OutputError

PATIENCE_S = 2.0
"""How long a folder is waited for: a run that was killed may take a moment to be gone."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A block in which no other process of this user and machine is in such a block for the folder, which need not be there.

    The lock is the system's own and goes with the process that has it, however that ends. Where the system has none, nothing is locked.

    Raises:
        OutputError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"ppclc-{os.getuid()}-{name}.lock"
    # Its name can be foreseen: a link that somebody has put there is not followed.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+", encoding="ascii") as file:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which children do not inherit
                break
            except OSError:
                if time.monotonic() > end:
                    file.seek(0)
                    who = file.read().strip()
                    raise OutputError(
                        f"{folder}: another run is at work there{f' (process {who})' if who else ''}; wait for it, or give another folder with -o"
                    ) from None
                time.sleep(0.05)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
