"""Files that are never half-written."""

import os
from pathlib import Path


def write_aside(path, content):
    """Write a file, text or bytes, as a whole or not at all; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)
