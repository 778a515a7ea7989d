"""The report of a run: `compare` has the numbers, `html` the page."""
