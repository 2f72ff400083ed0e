"""What Python and the extension say to each other, as one number: both must be of the same sources.

It imports nothing of this package, for ``setup.py`` reads it too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def stamp_of(extension: Path) -> Path:
    """Beside an extension, one for each Python: the torch that it was built for, and `interface_of` its sources."""
    return extension.with_name(extension.name.replace(".", "_built.", 1) + ".txt")


def interface_of(sources: Path) -> str:
    """A digest of the folder's files that know Python: schemas, the derivative, calls of layers; not of the kernels.

    Hidden files are an editor's: a lock of Emacs is a link to nothing.
    """
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("[!.]*.h"), *sources.glob("[!.]*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
