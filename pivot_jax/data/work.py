"""What an update has to look at, however it is packed: the basis of rates.

Counts alone; what they cost is `flops.py`'s business.
"""

import dataclasses

from pivot_jax.data import packing


@dataclasses.dataclass(frozen=True)
class Work:
  """What an update has to look at, however it is laid out.

  images: encoded once each. tokens: not padding, prompts counted once.
  pairs: of a token and one that it may look at. targets: positions of the loss.
  """

  images: int = 0
  tokens: int = 0
  pairs: int = 0
  targets: int = 0

  def times(self, factor: int) -> "Work":
    """Return that many times the work."""
    return Work(*(factor * x for x in dataclasses.astuple(self)))


def count(batch: packing.Batch, patches: int) -> Work:
  """Return what a batch of host arrays holds, its padding left out."""
  present = batch.segments > 0
  return Work(
    images=int((batch.image_index >= 0).sum()) // patches,
    tokens=int(present.sum()),
    # A token sees itself and as many before it as its position says.
    pairs=int(((batch.positions + 1) * present).sum()),
    targets=int((batch.loss_answer >= 0).sum()),
  )
