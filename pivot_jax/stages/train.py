"""Every training of an MLLM: stages 0 and 1, post-training, re-assembly.

  c.mine = stage("train", inputs=dict(init="@start", reference="@reference"),
    objective="dpo", data="preference", ...)

What differs is data: which parts come from where, which paths train, which
objective. Leaves an artifact of the whole model and `metrics.jsonl`.
"""

import contextlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pivot_jax import addresses, metrics, processes, sharding, trees
from pivot_jax.data import chat, coders, feed, opener, packing, streams
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm
from pivot_jax.training import (
  cost,
  loop,
  monitor,
  objectives,
  optimizer,
  recorder,
  reference_logps,
  starting_model,
  train_state,
  train_step,
)
from pivot_jax.weights import artifacts, checkpoint, resumable

LOG = logging.getLogger("pivot_jax")
# Rows shown by writers that can.
_SAMPLES = 8


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Train, save the artifact and return the measures."""
  tokenizer = load_tokenizer(addresses.tokenizer_folder(config.tokenizer))
  start = starting_model.assemble(config, inputs, tokenizer)
  processes.beat("verifying weights", allow=processes.SLOW)
  prints = sharding.fingerprint(start.params)
  starting_model.log_start(config, start, prints)
  coder = make_coder(config, tokenizer, start.mllm)
  mesh = sharding.make_mesh(config.mesh)
  logps = read_reference(inputs, prints, config, tokenizer)
  stream = processes.in_turn(
    "lengths", lambda: make_stream(config, coder, logps)
  )
  feed.check_processes(stream)
  job = _Job(config, out, start, stream, coder, mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    state, rows = job.run()
  # The optimizer's state goes before the model is written.
  examples, trained = int(state.examples), state.trainable
  del state
  processes.beat("saving the model", config.steps, allow=processes.SLOW)
  change = save_model(out, trained, start, config, tokenizer)
  return processes.decide(
    "result",
    lambda: (
      _report(config, out, start, prints, change, rows) | {"examples": examples}
    ),
  )


def make_coder(
  config: ConfigDict, tokenizer: chat.Tokenizer, model: mllm.MLLM
) -> feed.Coder:
  """Return how rows become examples for a model."""
  return coders.coder_of(
    config.to_dict(),
    tokenizer,
    image_size=model.vision.image_size if model.vision else 1,
    patches=model.vision.num_patches if model.vision else 1,
    long=opener.long_rows(config.long, [spec for spec, _ in specs(config)]),
    pairs=objective_of(config).pairs,
  )


def objective_of(config: ConfigDict) -> objectives.Objective:
  """Return the stage's objective."""
  return objectives.named(config.objective, f"{config.name}.objective")


def make_stream(
  config: ConfigDict,
  coder: feed.Coder,
  logps: coders.Reference | None = None,
) -> feed.Stream:
  """Return the stage's stream; `data` is one name or (name, weight) pairs."""
  return streams.open_stream(
    specs(config), coder, seed=config.data_seed, reference=logps
  )


def specs(config: ConfigDict) -> list[tuple[dict[str, Any], float]]:
  """Return the (entry, weight) pairs of a stage's data."""
  mix = ((config.data, 1.0),) if isinstance(config.data, str) else config.data
  return [(config.sources[name].to_dict(), weight) for name, weight in mix]


def writers_of(config: ConfigDict) -> tuple[str, ...]:
  """Return the metric writers of a stage; `tensorboard` is short for one."""
  asked = ("tensorboard",) if config.tensorboard else ()
  return tuple(dict.fromkeys((*asked, *config.get("writers", ()))))


def read_reference(
  inputs: Mapping[str, str],
  prints: Mapping[str, str],
  config: ConfigDict,
  tokenizer: chat.Tokenizer,
) -> coders.Reference | None:
  """Return the columns of the score stage, None where none are needed."""
  if not objective_of(config).reference:
    return None
  if "reference" not in inputs:
    raise InputError(
      f"{config.name}: {config.objective} needs reference log-probabilities: "
      'give the score stage in inputs, as reference="@reference"'
    )
  made = reference_logps.made_with(prints, tokenizer, config)
  return reference_logps.read(pathlib.Path(inputs["reference"]), made)


def save_model(
  out: pathlib.Path,
  trained: trees.Params,
  start: checkpoint.Model,
  config: ConfigDict,
  tokenizer: chat.Tokenizer,
) -> trees.Change:
  """Write the artifact: parameters, model.json, tokenizer.

  Returns how the files differ from the start, in the first process; raises
  InputError if a part that trains does not.
  """
  meta = start.meta | {
    "parts": list(config.parts),
    "preprocessing": {
      "resize": "crop" if config.resample[:4] == "crop" else "squash",
      "resample": config.resample,
    },
    "template": config.template,
    "mask": config.mask,
    "tokenizer": tokenizer.fingerprint,
    "stage": config.name,
  }
  # What is frozen leaves as it came, not as it was computed with.
  _, frozen = trees.split(start.params, config.trainable)
  artifacts.write(out, trees.merge(trained, frozen))
  change = trees.Change(start.params)
  if processes.first():
    prints = artifacts.written(out, change.add)
    lines = metrics.read(out)
    optimizer.check_moved(config, trained, change.moved, lines, out)
    artifacts.describe(out, meta, prints)
    tokenizer.save(out / "tokenizer")
  processes.barrier("model")
  return change


class _BadRows:
  """Adds up, at each checkpoint, the bad rows that all processes found."""

  def __init__(self, stream: feed.Stream, save_every: int):
    self._stream, self._save_every = stream, save_every

  def metrics(self, step, values, update, wait) -> None:
    del step, values, update, wait

  def due(self, step: int) -> bool:
    return step % self._save_every == 0

  def state(self, state, step: int) -> None:
    del state, step
    feed.check_bad(self._stream)


class _Job:
  """One training run: builds the state, resumes, fits."""

  def __init__(self, config, out, start, stream, coder, mesh):
    self.config, self.out, self.start = config, out, start
    self.stream, self.coder, self.mesh = stream, coder, mesh

  def run(self) -> tuple[train_state.TrainState, str]:
    """Return the last state and the digest of the rows seen, in order."""
    config = self.config
    state, tx = train_state.make_state(
      self.start.params,
      trainable=config.trainable,
      tx=optimizer.from_config(config),
      mesh=self.mesh,
      seed=config.seed,
      dtype=config.compute.dtype,
    )
    for field in ("lr", "weight_decay"):
      name = f"{config.name}.{field}"
      optimizer.check_rules(config[field], self.start.params, name)
    saved = resumable.Resumable(
      self.out / "checkpoints",
      keep_every=config.get("keep_every", 0),
      save_concurrent_gb=config.get("save_concurrent_gb") or None,
      restore_concurrent_gb=config.get("restore_concurrent_gb", 2.0),
    )
    state, rows = recorder.resume(config.name, saved, state)
    layout = self._layout(state)
    self._log_memory(state, layout)
    writer = metrics.Writer(
      self.out, step=int(state.step), writers=writers_of(config)
    )
    if writer.shows_samples:
      writer.write_samples(self._samples())
    hook = self._recorder(saved, writer, state, rows)
    step_fn = train_step.make_train_step(
      self._loss(self.start.mllm),
      tx,
      accum=config.accum,
      examples=config.batch,
      shardings=jax.tree.map(lambda x: x.sharding, state),
      dtype=config.compute.dtype,
    )
    left = max(0, config.steps - int(state.step))
    updates = monitor.ahead(self._updates(layout, int(state.examples), left))
    # Whatever ends it, a commit under way is finished.
    with contextlib.closing(saved), contextlib.closing(updates):
      state = loop.fit(
        state,
        step_fn,
        updates,
        num_steps=config.steps,
        hooks=[_BadRows(self.stream, config.save_every), hook],
        should_stop=loop.stop_requested,
        trace=monitor.Trace(config.profile, self.out / "profile"),
      )
      processes.beat("saving", int(state.step), allow=processes.SLOW)
    writer.close()
    if int(state.step) < config.steps:
      raise loop.Stopped(
        f"{config.name} saved at step {int(state.step)} of {config.steps}; the "
        "same command continues there"
      )
    return state, f"{hook.rows:08x}"

  def _recorder(
    self,
    saved: resumable.Resumable,
    writer: metrics.Writer,
    state: train_state.TrainState,
    rows: int,
  ) -> recorder.Recorder:
    return recorder.Recorder(
      self.config.name,
      saved,
      writer,
      state,
      rows,
      self.start.mllm,
      steps=self.config.steps,
      batch=self.config.batch,
      save_every=self.config.save_every,
    )

  def _loss(self, model: mllm.MLLM):
    return objective_of(self.config).build(model, self.config)

  def _layout(self, state) -> packing.Layout:
    config = self.config
    start, steps = 0, config.steps
    if int(state.examples) != int(state.step) * config.batch:
      # It goes on with another batch: its updates begin where it stands. Else
      # they are those of the whole run, so that a killed one keeps its shapes.
      start, steps = int(state.examples), config.steps - int(state.step)
    return feed.choose_layout(
      self.stream,
      self.coder,
      pack=config.pack.to_dict(),
      batch=config.batch,
      steps=steps,
      start=start,
      shards=sharding.row_shards(self.mesh) * config.accum,
      share=feed.Share.of(self.mesh),
    )

  def _updates(self, layout: packing.Layout, start: int, steps: int):
    return feed.updates(
      self.stream,
      layout,
      batch=self.config.batch,
      start=start,
      mesh=self.mesh,
      sft_group=self.config.sft_group,
      threads=feed.threads(self.config.workers),
      steps=steps,
    )

  def _samples(self) -> list[tuple[str, tuple, str]]:
    """Return the first rows of the run as they are learnt."""
    found = []
    for example in self.stream.examples(range(_SAMPLES)):
      answers = map(self.coder.tokenizer.decode, example.answers)
      text = self.coder.tokenizer.decode(example.prompt)
      said = "\n--\n".join((text, *answers))
      found.append((example.id, example.images, said))
    return found

  def _log_memory(self, state, layout: packing.Layout) -> None:
    """Say what an update will take, before anything is compiled."""
    found = cost.estimate_memory(
      state,
      self._loss,
      self.start.mllm,
      packing.empty(layout),
      accum=self.config.accum,
      shards=sharding.row_shards(self.mesh),
      chunk=self.config.chunk,
      available=cost.available_memory(),
    )
    LOG.info(
      "%s attends by %s; memory: %s",
      self.config.name,
      self.start.mllm.compute.attention,
      found,
    )
    if not found.fits:
      LOG.warning("that is more than there is: %s", cost.advice(found))


def _report(config, out, start, prints, change, rows) -> dict[str, Any]:
  lines = metrics.read(out)
  tail = lines[-max(1, len(lines) // 10) :]
  loss = float(np.mean([line["losses/total"] for line in tail]))
  changes = {f"change/{part}": change.of(part) for part in start.params}
  return changes | {
    "rows": rows,
    "init": trees.digest(prints),
    "loss": float(f"{loss:.6g}"),
    "steps": config.steps,
    "parameters": {part: trees.count(x) for part, x in start.params.items()},
  }
