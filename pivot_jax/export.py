"""Hand weights to other tools: `python -m pivot_jax.export --help`."""

from pivot_jax.weights import export

if __name__ == "__main__":
  export.run()
