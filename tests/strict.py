"""The checker of annotations that tests run the package with."""

import beartype

# An int is a float, as PEP 484 has it.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
