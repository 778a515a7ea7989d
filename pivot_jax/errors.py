"""The one exception that a user's own mistake raises.

`main` prints it as a single line, without a traceback. A message names the
file, the row and the field, and says what to do.
"""


class InputError(ValueError):
  """Something the user gave is wrong: a file, a row, a weight or a setting.

  `kind` is what a program may tell faults of a row apart by, one of those that
  `data/tools/faults.py` lists; "" where nobody needs to.
  """

  def __init__(self, message: str, *, kind: str = ""):
    super().__init__(message)
    self.kind = kind
