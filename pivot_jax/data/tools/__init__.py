"""The commands of `python -m pivot_jax.data`: look at data before a run.

In reading order:

  check.py         the command `check`: options, output, exit status
  check_config.py  the files of a config, and how its stages read them
  check_files.py   opens a file, or tells the fault of the whole of it
  check_rows.py    looks at rows, one at a time, for a fault or a length
  faults.py        the kinds of fault, their remedies, and the two reports
  show.py          the command `show`, and rows drawn on a terminal
  shown_rows.py    a row as the model sees it: pictures, tokens, targets
  shown_page.py    shown rows as one page of HTML
  convert.py       the command `convert`: any data set as ArrayRecord
"""
