"""The one exception that a user's own mistake raises.

`main` prints it as a single line, without a traceback. A message names the
file, the row and the field, and says what to do.
"""

import traceback


class InputError(ValueError):
  """Something the user gave is wrong: a file, a row, a weight or a setting.

  `kind` is what a program may tell faults of a row apart by, one of those that
  `data/tools/faults.py` lists; "" where nobody needs to.
  """

  def __init__(self, message: str, *, kind: str = ""):
    super().__init__(message)
    self.kind = kind


def raised_by(error: BaseException, file: str) -> str:
  """Return an error of a user's program as one line, with its place in a file.

  The last line of the file that led to it is named; none, if none did.
  """
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
  ]
  said: str | BaseException = error
  if isinstance(error, SyntaxError) and error.filename == file:
    lines, said = [error.lineno], error.msg
  place = f"{file}:{lines[-1]}" if lines else file
  name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
  return " ".join(f"{place}: {name}{said}".split())
