"""The checker of annotations that tests run the package with."""

import beartype
import numpy as np

# As PEP 484 has it an int is a float; and numbers of numpy are numbers.
check = beartype.beartype(
  conf=beartype.BeartypeConf(
    hint_overrides=beartype.BeartypeHintOverrides(
      {
        bool: bool | np.bool_,
        int: int | np.integer,
        float: float | int | np.integer | np.floating,
      }
    )
  )
)
