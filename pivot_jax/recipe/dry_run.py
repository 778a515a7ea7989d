"""What a run would do: stages, shapes, parameters, memory and row counts.

Nothing is trained, written or compiled; sources are opened and counted.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pivot_jax import addresses, trees
from pivot_jax.data import opener
from pivot_jax.data.sources import folders
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.recipe import plan, run_folder
from pivot_jax.stages import detach
from pivot_jax.training import optimizer, starting_model, train_state
from pivot_jax.weights import checkpoint

_Configs = dict[str, Any]


def describe(planned: plan.Plan) -> str:
  """Return the plan with what can be known of each stage beforehand."""
  lines = [plan.describe(planned), ""]
  models: dict[str, _Configs] = {}
  for step in planned.steps:
    details = _rows(step) + label_gaps(step)
    if step.kind == "train":
      details += _train(step, models)
    if step.kind == "detach":
      address = detach.address_of(step.name, step.inputs)
      models[str(step.folder)] = _configs(address, models)
    if details:
      lines += [step.name, *(f"  {line}" for line in details)]
  return "\n".join(lines)


def label_gaps(step: run_folder.Step) -> list[str]:
  """Return warnings of label maps whose numbers have a gap."""
  config = step.config
  if step.kind != "segment_probe" or config.num_classes:
    return []
  found = []
  for name, _ in config.data:
    source = opener.open_source(config.sources[name].to_dict())
    odd = folders.sampled_label_gap(source, config.ignore)
    found += [f"warning: {name}: {odd}"] if odd else []
  return found


def _rows(step: run_folder.Step) -> list[str]:
  found = []
  for name in sorted(step.config.sources):
    source = opener.open_source(step.config.sources[name].to_dict())
    found.append(f"{name}: {len(source)} rows")
  return found


def _train(step: run_folder.Step, models: dict[str, _Configs]) -> list[str]:
  """Return parameters and state bytes of a training stage, from shapes.

  Raises:
    InputError: rules that match no parameter, or leave one out.
  """
  config = step.config
  shapes = _shapes(step, models)
  for field in ("lr", "weight_decay"):
    optimizer.check_rules(config[field], shapes, f"{config.name}.{field}")
  inside, _ = trees.split(shapes, config.trainable)
  total, training = trees.count(shapes), trees.count(inside)
  megabytes = _state_bytes(shapes, config) / 1e6
  pack = config.pack
  tokens = pack.tokens or pack.get("row") or "as long as the longest example"
  return [
    _sizes(models[str(step.folder)], config.batch),
    f"{total:,} parameters, {training:,} train; {megabytes:,.1f} MB of state, "
    "activations not counted",
    f"{config.steps} updates of {config.batch} examples; row tokens: {tokens}",
  ]


def _state_bytes(shapes: trees.Tree, config: ConfigDict) -> int:
  """Return the bytes that a training holds from update to update.

  Parameters, gradients, the optimizer's state, and kernels as the products take
  them.
  """
  dtype = jnp.dtype(config.compute.dtype)
  inside, outside = trees.split(shapes, config.trainable)
  frozen = train_state.kernel_dtypes(outside, config.compute.dtype)
  tx = optimizer.from_config(config)(inside)
  state = jax.eval_shape(tx.init, inside)
  size = 2 * 4 * trees.count(inside)
  size += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  for path, leaf in trees.flatten(outside).items():
    size += leaf.size * jnp.dtype(frozen.get(path, leaf.dtype)).itemsize
  if dtype != jnp.float32:
    size += sum(
      leaf.size * dtype.itemsize
      for path, leaf in trees.flatten(inside).items()
      if path.endswith("/kernel")
    )
  return size


def _sizes(model: _Configs, batch: int) -> str:
  """Return the shapes that pass through a model, as one line."""
  vision, llm = model["vision"], model["llm"]
  found = []
  if vision is not None:
    side, patches = vision.image_size, vision.num_patches
    found.append(f"images [{batch}, {side}, {side}, 3]")
    found.append(f"features [{batch}, {patches}, {vision.hidden_size}]")
  if llm is not None:
    found.append(f"hidden [rows, tokens, {llm.hidden_size}]")
    found.append(f"head [{llm.hidden_size}, {llm.vocab_size}]")
  return ", ".join(found)


def _shapes(step: run_folder.Step, models: dict[str, _Configs]) -> Any:
  """Return the shapes of a stage's model and notes its configs for later."""
  config = step.config.copy_and_resolve_references()
  tokenizer = load_tokenizer(checkpoint.tokenizer_folder(config.tokenizer))
  outside = {}
  for name, address in step.inputs.items():
    folder = str(addresses.parse(address).path)
    for part, fields in models.get(folder, {}).items():
      if fields is not None and name in ("init", part):
        config[part] = dataclasses.asdict(fields) | {"init": ""}
    # What an earlier stage will make is not there yet.
    if folder not in models and name != "reference":
      outside[name] = address
  found = []

  def assemble():
    found.append(starting_model.assemble(config, outside, tokenizer))

  jax.eval_shape(assemble)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found[0].params
  )
  model = found[0].mllm
  models[str(step.folder)] = {"vision": model.vision, "llm": model.llm}
  return shapes


def _configs(address: str, models: dict[str, _Configs]) -> _Configs:
  folder = str(addresses.parse(address).path)
  if folder in models:
    return models[folder]
  loaded = checkpoint.load(address, deferred=True)
  return {"vision": loaded.vision, "llm": loaded.llm}
