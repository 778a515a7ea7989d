"""Weights from addresses, and to folders that other tools read.

In reading order: `artifacts` (a finished model as a folder that is verified when
it is read), `model_json` (what it says of itself, checked), `checkpoint` (an address to parameters and what they are),
`resumable` (the state of a training that was stopped), `convert/` (published
formats, in and out), `export` and `card` (a folder for another tool and its
README.md), `api` (`pivot_jax.load` and `save`).
"""
