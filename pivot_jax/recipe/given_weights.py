"""Opens what no stage of a plan makes, before the first stage runs.

Each address is opened once, and no more is read than tells what it holds: a
mistyped one, or one that lacks a part, is answered before the stages that come
first have trained. The stages say in `NEEDS` what they cannot do without.
"""

import pathlib
from collections.abc import Iterable

from pivot_jax import addresses
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.recipe.inputs import Step
from pivot_jax.stages import (
  detach,
  evaluate,
  gradcam,
  linear_probe,
  score,
  segment_probe,
)
from pivot_jax.training import reference_logps, starting_model
from pivot_jax.weights import checkpoint

# By kind; of a training it depends on its parts.
_NEEDS = {
  "score": score.NEEDS,
  "detach": detach.NEEDS,
  "linear_probe": linear_probe.NEEDS,
  "segment_probe": segment_probe.NEEDS,
  "gradcam": gradcam.NEEDS,
  "evaluate": evaluate.NEEDS,
}


def check(steps: Iterable[Step]) -> None:
  """Raise InputError for the first stage that cannot take what it is given."""
  steps = list(steps)
  made = {step.folder for step in steps}
  given, seen = _Given(), set()
  for step in steps:
    for name in _read(step):
      address = step.inputs[name]
      key = (step.kind, name, address, tuple(step.config.get("parts", ())))
      if key in seen:
        continue
      seen.add(key)
      try:
        if addresses.parse(address).path not in made:
          _check(step, name, given)
      except InputError as error:
        where = "" if address in str(error) else f"{address}: "
        raise InputError(f"{step.name}: {where}{error}") from None


class _Given:
  """Weights and tokenizers, each opened once."""

  def __init__(self):
    self._weights: dict[str, checkpoint.Loaded] = {}
    self._tokenizers: dict[pathlib.Path, chat.Tokenizer] = {}
    self._whole: set[str] = set()

  def weights(self, address: str) -> checkpoint.Loaded:
    if address not in self._weights:
      self._weights[address] = checkpoint.load(address, deferred=True)
    return self._weights[address]

  def tokenizer(self, address: str) -> chat.Tokenizer:
    folder = addresses.tokenizer_folder(address)
    if folder not in self._tokenizers:
      self._tokenizers[folder] = load_tokenizer(folder)
    return self._tokenizers[folder]

  def check_unread(self, address: str) -> None:
    """Raise unless what is given back at the end is there."""
    loaded = self.weights(address)
    if "vision" in loaded.params and address not in self._whole:
      checkpoint.unread(loaded.meta)
      self._whole.add(address)


def _read(step: Step) -> list[str]:
  """Return the inputs that a stage reads; raise if one of them is absent."""
  if step.kind == "train":
    names = starting_model.weights_of(step.inputs)
    return names + [n for n in ("reference",) if n in step.inputs]
  if step.kind not in _NEEDS:
    return []
  if step.kind == "detach":
    address = detach.address_of(step.name, step.inputs)
    return [next(n for n, one in step.inputs.items() if one == address)]
  if "init" not in step.inputs:
    raise InputError(
      f'{step.name}: has no init in inputs: give the model, as init="@STAGE" or '
      "an address"
    )
  return ["init"]


def _check(step: Step, name: str, given: _Given) -> None:
  """Raise for an input that is not what a stage needs."""
  address = step.inputs[name]
  if name == "reference":
    reference_logps.check_there(pathlib.Path(address))
    return
  loaded = given.weights(address)
  if step.kind == "train":
    tokenizer = given.tokenizer(step.config.tokenizer)
    starting_model.check_given(name, address, loaded, step.config, tokenizer)
  else:
    needs = _NEEDS[step.kind]
    checkpoint.check_parts(address, loaded, needs)
    if "tokenizer" in needs:
      given.tokenizer(address)
  if step.kind in ("train", "detach"):
    given.check_unread(address)
