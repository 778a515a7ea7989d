"""Sources of published size: `python -m bench.data`.

In reading order: `__main__.py` plans the runs, `files.py` writes made-up
sources, `runs.py` measures one thing in a process, `tables.py` makes the page.
"""
