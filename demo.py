"""The whole of Pare on a bundled tiny Olmo 3, on a laptop's CPU, without network."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 16  # one document in 16 is held out


def is_held_out(name: str) -> bool:
    """True for about one document name in HELD_OUT_SHARE, the same ones on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def python_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of real text that every Python installation carries.

    The language reference (`pydoc_data.topics`) and the standard library's sources with their docstrings. Tests,
    installed packages and the generated tables of `encodings` stay out. Names do not depend on where Python lies.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        folders = name.split("/")[:-1]
        if {"site-packages", "test", "tests", "encodings", "pydoc_data"}.isdisjoint(folders):
            yield name, path.read_text(encoding="utf-8", errors="replace")
