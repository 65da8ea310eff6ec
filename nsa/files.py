"""Files that are never half-written, and where compiled code is kept."""

import os
import tempfile
from pathlib import Path


def write_aside(path, content):
    """Write a file, text or bytes, as a whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name  # nobody else's
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        aside.parent.rmdir()


def cache_dir():
    """Where compiled code is kept: NSA_CACHE_DIR, or nsa-ascend in the user's cache folder."""
    chosen = os.environ.get("NSA_CACHE_DIR")
    folder = chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa-ascend"
    return Path(folder).absolute()
