"""Our side of the training benchmarks: the toy's examples, packed and trained.

Model, packing, objectives and update are the package's own, put together as
its stages do it; this file feeds them the toy and keeps what the gate compares.
Unless another `compute` is given, blocks are laid out one after another, as
configs/pivot.py has it on a CPU.

Q pairs, S sequences (chosen ones first), M loss positions.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bench import harness
from bench.gpu import sizes as gpu_sizes
from bench.update import toy
from pivot_jax import sharding, trees
from pivot_jax.data import packing
from pivot_jax.models import layers
from pivot_jax.training import loop, optimizer, train_state, train_step
from pivot_jax.weights import checkpoint

LEARNING_RATE = 1e-4
CLIP = 1.0
SEED = 0
COMPUTE = layers.Compute(scan=False, attention="auto")

# The gate compares what training added to these.
_TENSORS = (
  "llm/embed_tokens/embedding",
  "llm/norm/scale",
  "projector/linear_1/kernel",
  "vision/embeddings/patch_embedding/kernel",
)


class Setup:
  """The toy on this process's mesh: model, placed parameters, data."""

  def __init__(self, folder: pathlib.Path, compute: layers.Compute = COMPUTE):
    self.data = toy.read(folder)
    # The tower's blocks are all used, as in the peers' configuration.
    layer = self.data.sizes["layers"]
    loaded = checkpoint.load_model(
      f"hf:{self.data.folder}?feature_layer={layer}", compute=compute
    )
    self.model = loaded.mllm
    self.mesh = sharding.make_mesh({"data": -1})
    self.params = sharding.place(loaded.params, self.mesh)

  def context(self):
    """Return the context in which the model's functions are called."""
    return layers.logical_rules(sharding.ACTIVATION_RULES)

  def compute(self, function: Callable, batch: Any) -> np.ndarray:
    """Return function(parameters, batch), compiled for itself."""
    with self.context():
      return np.asarray(jax.jit(function)(self.params, batch))

  def packed(
    self, examples: Sequence[packing.Example], *, sft_group: int = 0
  ) -> packing.Batch:
    """Return the examples as the stages pack them."""
    layout = packing.layout_for([examples], **self._sizes)
    batch = packing.pack(examples, layout, sft_group=sft_group)
    return sharding.place_rows(batch, self.mesh)

  def alone(self, examples: Sequence[packing.Example]) -> packing.Batch:
    """Return example i alone in row i, the rows exactly as long as needed."""
    longest = max(packing.length(e, self.data.patches) for e in examples)
    sizes = self._sizes | {"row_tokens": longest}
    layout = packing.layout_for([examples], **sizes)
    batch = packing.pack_in_order(examples, layout)
    return sharding.place_rows(batch, self.mesh)

  @property
  def _sizes(self):
    sizes = self.data.sizes
    return {"patches": self.data.patches, "image_size": sizes["image"]}


def examples(
  data: toy.Toy | gpu_sizes.Data,
  answers: Sequence[str],
  reference: np.ndarray | None = None,
) -> list[packing.Example]:
  """Return the data's examples with the named answers, ("chosen",)."""
  columns = {"chosen": data.chosen, "rejected": data.rejected}
  found = []
  for i, text in enumerate(data.prompt):
    prompt = np.concatenate([[packing.IMAGE_TOKEN], text])
    tokens = tuple(columns[name][i] for name in answers)
    fixed = None if reference is None else tuple(reference[i].tolist())
    found.append(
      packing.Example(
        id=str(i),
        prompt=prompt,
        prompt_targets=np.zeros(len(prompt), bool),
        answers=tokens,
        answer_targets=tuple(np.ones(len(t), bool) for t in tokens),
        images=(data.images[i],),
        reference=fixed,
      )
    )
  return found


def training(
  setup: Setup, loss_fn: Callable, batch: Any, scores: np.ndarray
) -> harness.Ready:
  """Return the update of a loss; `scores` are log-probabilities before it."""
  state, tx = train_state.make_state(
    setup.params,
    trainable=(".*",),
    tx=functools.partial(
      optimizer.adamw,
      lr=((".*", LEARNING_RATE),),
      factor=optimizer.schedule("constant", steps=1, warmup=0.0),
      clip=CLIP,
    ),
    mesh=setup.mesh,
    seed=SEED,
  )
  count = len(setup.data.prompt)
  step_fn = train_step.make_train_step(
    loss_fn, tx, accum=1, examples=count, dtype=setup.model.compute.dtype
  )
  held = {"state": state}
  history: list[Any] = []

  def drive(count, begin, end):
    with jax.set_mesh(setup.mesh), setup.context():
      for _ in range(count):
        begin()
        held["state"], metrics = step_fn(held["state"], batch)
        jax.block_until_ready(held["state"])
        history.append(metrics)
        end()

  def numbers():
    kept = [loop.means(jax.device_get(m)) for m in history]
    before = trees.flatten(setup.params)
    after = trees.flatten(train_state.params_of(held["state"]))
    return {
      "logps": scores,
      "loss": np.array([m["losses/total"] for m in kept]),
      "grad_norm": np.array([m["grad_norm"] for m in kept]),
    } | {f"update/{p}": np.asarray(after[p] - before[p]) for p in _TENSORS}

  return harness.Ready(drive=drive, numbers=numbers)


def scoring(
  setup: Setup, score: Callable, batch: Any, order: Callable
) -> harness.Ready:
  """Return a forward pass alone; `order` brings its result into our order."""
  held = {}

  def drive(count, begin, end):
    with jax.set_mesh(setup.mesh), setup.context():
      for _ in range(count):
        begin()
        held["logps"] = jax.block_until_ready(score(setup.params, batch))
        end()

  def numbers():
    return {"logps": order(np.asarray(held["logps"]))}

  return harness.Ready(drive=drive, numbers=numbers)
