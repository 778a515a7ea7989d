"""The one exception that a user's own mistake raises.

`main` prints it as a single line, without a traceback. A message names the
file, the row and the field, and says what to do.
"""


class InputError(ValueError):
  """Something the user gave is wrong: a file, a row, a weight or a setting."""
