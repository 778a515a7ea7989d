"""Before anything runs: numbers, choices, files, shapes and memory.

`check` answers a mistake in the last stage's settings in the first second, not
after the hours of the stages before it. A mistake that only a stage can know
(weights that do not fit, a row that is too long) stays with the stage.
`describe` says what a run would do: sources are opened and counted, models are
made as shapes; nothing is trained, written or compiled.
"""

import dataclasses
import functools
import json
import numbers
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pivot_jax import (
  addresses,
  metrics,
  names,
  processes,
  sharding,
  texts,
  trees,
)
from pivot_jax.data import chat, coders, images, opener, streams
from pivot_jax.data.sources import folders
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import attention, layers
from pivot_jax.recipe import given_weights, plan
from pivot_jax.recipe.inputs import Step
from pivot_jax.stages import detach, train
from pivot_jax.training import (
  monitor,
  objectives,
  optimizer,
  starting_model,
  train_state,
)
from pivot_jax.weights import checkpoint

# The configs of a model by part, vision and llm.
_Configs = dict[str, Any]
_AT_LEAST_1 = (
  *("batch", "steps", "accum", "save_every", "chunk", "max_length"),
  *("max_new_tokens", "epochs", "hidden", "examples", "resamples"),
  "max_iterations",
)
# Name, the rule in words, the rule; each number is checked where it occurs.
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
  *((name, "1 or more", lambda x: x >= 1) for name in _AT_LEAST_1),
  ("clip", "a number over 0", lambda x: x > 0),
  ("beta", "a number over 0", lambda x: x > 0),
  ("tolerance", "a number over 0", lambda x: x > 0),
  ("validation", "a share over 0 and under 1", lambda x: 0 < x < 1),
  ("seed", "0 or more", lambda x: x >= 0),
  ("keep_every", "0 or more", lambda x: x >= 0 and x == int(x)),
  ("save_concurrent_gb", "0 or more", lambda x: x >= 0),
  ("restore_concurrent_gb", "a number over 0", lambda x: x > 0),
  ("workers", "a whole number, -1 or more", lambda x: x >= -1 and x == int(x)),
  ("data_seed", "0 or more", lambda x: x >= 0),
)
# Rows of a file whose fields and images are looked up before anything runs; a
# file of more is left to `python -m pivot_jax.data check`.
_LOOKED_AT = 20_000
_CHOICES = {
  "template": chat.TEMPLATES,
  "mask": chat.MASKS,
  "schedule": optimizer.SCHEDULES,
  "moments": optimizer.MOMENTS,
  "long": ("auto", *coders.LONG),
}


def check(steps: Iterable[Step]) -> None:
  """Raise InputError for the first stage that could not run as it is set."""
  steps = list(steps)
  for step in steps:
    _check_numbers(step)
    check_choices(step)
    if step.kind == "train":
      _check_objective(step)
  if all(step.kind == "report" for step in steps):
    raise InputError(
      "there is nothing to run: no stage has its data; on your own files every "
      "stage needs --config.files.pretrain"
    )
  for step in steps:
    if step.kind == "train":
      metrics.check_writers(train.writers_of(step.config))
  _check_pairs(steps)
  for mesh in {json.dumps(s.config.mesh.to_dict()): s for s in steps}.values():
    sharding.make_mesh(mesh.config.mesh)
  for step in steps:
    # The models' head dims come with their weights, and are checked there.
    compute = layers.Compute(**step.config.compute.to_dict())
    platform, capability = attention.device()
    attention.choose(
      compute, head_dims=(), platform=platform, capability=capability
    )
    monitor.window_of(step.config.profile)
  _check_sources(steps)
  given_weights.check(steps)


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
      said = (step.name, *(f"  {line}" for line in details))
      lines += map(texts.shown, said)
  return "\n".join(lines)


def label_gaps(step: Step) -> list[str]:
  """Return warnings of label maps whose numbers have a gap."""
  config = step.config
  if step.kind != "segment_probe" or config.num_classes:
    return []
  found = []
  for name, _ in config.data:
    spec = json.dumps(config.sources[name].to_dict(), sort_keys=True)
    odd = _label_gap(spec, config.ignore)
    found += [f"warning: {name}: {odd}"] if odd else []
  return found


@functools.cache
def _label_gap(spec: str, ignore: int | str) -> str:
  """Look at the maps of a source, in JSON, once for all that read it."""
  source = opener.open_source(json.loads(spec))
  return folders.sampled_label_gap(source, ignore)


def _check_pairs(steps: Iterable[Step]) -> None:
  """Raise for arms that are compared on the same rows and see others."""
  steps = list(steps)
  reports = [step.config for step in steps if step.kind == "report"]
  for config in reports:
    models = {arm["name"]: arm["model"] for arm in config.get("arms", ())}
    for pair in config.get("compared", ()):
      both = [models[pair[side]] for side in ("one", "other")]
      if pair["same_rows"]:
        _check_same_rows(both, steps)


def _check_same_rows(models: Sequence[str], steps: Iterable[Step]) -> None:
  by_folder: dict[pathlib.Path, list[Step]] = {}
  for step in steps:
    if step.kind == "train" and step.folder.name in models:
      by_folder.setdefault(step.folder.parent, []).append(step)
  for pair in by_folder.values():
    for field in ("data", "data_seed", "batch", "steps"):
      values = {str(step.config[field]) for step in pair}
      if len(values) > 1:
        raise InputError(
          f"{' and '.join(step.name for step in pair)} differ in {field} "
          f"({' and '.join(sorted(values))}): give both the same rows"
        )


def _check_numbers(step: Step) -> None:
  config = step.config
  if names.is_own(step.kind):
    return
  for name, words, holds in _RANGES:
    if name not in config:
      continue
    value = config[name]
    if not isinstance(value, numbers.Real) or not holds(value):
      raise InputError(f"{step.name}.{name}={value!r}: give {words}")
  if step.kind == "train":
    if not 0 <= config.warmup < 1:
      raise InputError(
        f"{step.name}.warmup={config.warmup!r}: give a share of the updates, 0 "
        "or more and under 1"
      )
    for field in ("lr", "weight_decay"):
      _check_rules(step, field)
  if step.kind == "segment_probe":
    _check_background(step.name, config)


def _check_rules(step: Step, field: str) -> None:
  """Check ordered rules (pattern, value): pairs, and no negative value."""
  for rule in step.config[field]:
    pair = isinstance(rule, (tuple, list)) and len(rule) == 2
    if not pair or not isinstance(rule[1], numbers.Real) or rule[1] < 0:
      raise InputError(
        f"{step.name}.{field}: {rule!r} is not a rule; give (pattern, value) with "
        'a value of 0 or more, as ((".*", 1e-5),)'
      )


def _check_background(name: str, config: ConfigDict) -> None:
  for field in ("background", "ignore"):
    value = config[field]
    if value == "none":
      continue
    try:
      index = int(value)
    except ValueError:
      raise InputError(
        f'{name}.{field}={value!r}: give the index of a class, or "none"'
      ) from None
    beyond = config.num_classes and index >= config.num_classes
    if field == "background" and beyond:
      raise InputError(
        f"{name}.{field}={value!r}: there are {config.num_classes} classes, "
        "from 0 on"
      )


def check_choices(step: Step) -> None:
  """Raise InputError for a setting of a stage that names no known choice."""
  if names.is_own(step.kind):
    return
  for name, options in _CHOICES.items():
    value = step.config.get(name, options[0])
    if value not in options:
      raise InputError(
        f"{step.name}.{name}={value!r}: choose one of {', '.join(options)}"
      )
  if "objective" in step.config:
    objectives.named(step.config.objective, f"{step.name}.objective")
  if "resample" in step.config:
    try:
      images.parse_resample(step.config.resample)
    except InputError as error:
      raise InputError(f"{step.name}.{error}") from None


def _check_objective(step: Step) -> None:
  """Raise for an objective without the reference that it needs."""
  name = step.config.objective
  if objectives.named(name).reference and "reference" not in step.inputs:
    raise InputError(
      f"{step.name}: {name} needs reference log-probabilities: give the score "
      'stage in inputs, as reference="@reference"'
    )


def _check_sources(steps: Iterable[Step]) -> None:
  """Open every source once: files there, records readable, images in place."""
  steps, sizes = list(steps), {}
  for step in steps:
    for spec in step.config.get("sources", {}).values():
      fields = spec.to_dict()
      key = json.dumps(fields, sort_keys=True)
      if key not in sizes:
        sizes[key] = _check_source(fields)
  for step in steps:
    _check_batch(step, sizes)
    for name, spec in step.config.get("sources", {}).items():
      size = sizes[json.dumps(spec.to_dict(), sort_keys=True)]
      trains = step.kind == "segment_probe" and name == step.config.data[0][0]
      if trains and size < step.config.batch:
        raise InputError(
          f"{step.name}.batch={step.config.batch} is more than the {size} "
          "training images: lower it or give more images"
        )


def _check_batch(step: Step, sizes: dict[str, int]) -> None:
  """Raise for a training whose rows are fewer than those of one update."""
  if step.kind != "train":
    return
  data = step.config.data
  names = [data] if isinstance(data, str) else [name for name, _ in data]
  keys = [
    json.dumps(step.config.sources[name].to_dict(), sort_keys=True)
    for name in names
  ]
  rows = sum(sizes[key] for key in keys)
  if rows < step.config.batch:
    raise InputError(
      f"{step.name}: the data has {rows} rows, fewer than batch="
      f"{step.config.batch}: lower the batch or give more rows"
    )


def _check_source(fields: dict[str, Any]) -> int:
  """Return the number of rows of a source that can be opened."""
  root = fields.get("image_root")
  if root and not pathlib.Path(root).is_dir():
    raise InputError(f"{root}: no such folder of images")
  source = opener.open_source(fields)
  # With `max_bad` rows may be bad, and are found as they are read.
  texts = fields["kind"] in (*opener.TEXTS, "eval")
  if texts and not fields.get("max_bad"):
    looked_at = range(min(_LOOKED_AT, len(source)))
    for index in looked_at[processes.index() :: processes.count()]:
      try:
        source.check_row(index)
      except InputError as error:
        raise InputError(f"{error}; {streams.REMEDY}") from None
  return len(source)


def _rows(step: Step) -> list[str]:
  found = []
  for name in sorted(step.config.sources):
    source = opener.open_source(step.config.sources[name].to_dict())
    found.append(f"{name}: {len(source)} rows")
  return found


def _train(step: Step, models: dict[str, _Configs]) -> list[str]:
  """Return parameters and state bytes of a training stage, from shapes.

  Raises:
    InputError: rules that match no parameter, or skip one.
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


def _shapes(step: Step, models: dict[str, _Configs]) -> Any:
  """Return the shapes of a stage's model and note its configs for later."""
  config = step.config.copy_and_resolve_references()
  tokenizer = load_tokenizer(addresses.tokenizer_folder(config.tokenizer))
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
