"""One form for texts that are compared: canonical composition (NFC).

The same letters have several spellings in Unicode: macOS decomposes the names
of files, and corpora of Korean or Vietnamese decompose answers. Not for what
must stay bytes: digests, ids that rows are stored by, paths that are opened.
"""

import unicodedata


def canonical(text: str) -> str:
  """Return a text in NFC, in which equal texts have equal characters."""
  return unicodedata.normalize("NFC", text)
