"""Reference log-probabilities as columns: DPO's reference model is data.

  c.reference = stage("score", inputs=dict(init="@stage1_full"), ...)

Scores every row of a preference set once with a fixed model and writes
`reference.npz` (id, logps [N, 2] float32: chosen and rejected, summed over the
answer's tokens, crc of the row's tokens) and `reference.json`, the fingerprint
of weights, template and tokenizer that a training stage compares with its own.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pivot_jax import (
  checkpoint,
  metrics,
  objectives,
  reference,
  sharding,
  train,
  trees,
)
from pivot_jax.data import packing, pipeline, registry
from pivot_jax.models import layers


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Scores all rows and returns their number and mean log-probabilities."""
  compute = layers.Compute(**config.compute.to_dict())
  model = checkpoint.load_model(
    inputs["init"], needs=(*checkpoint.PARTS, "tokenizer"), compute=compute
  )
  coder = pipeline.Coder(
    tokenizer=model.tokenizer,
    template=config.template,
    mask=config.mask,
    pairs=True,
    image_size=model.mllm.vision.image_size,
    resample=config.resample,
  )
  source = registry.open_source(config.sources[config.data].to_dict())
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    columns = _columns(config, model, coder, source, mesh)
  made = reference.made_with(
    trees.fingerprint(model.params), model.tokenizer, config
  )
  reference.write(out, columns, made)
  chosen, rejected = columns["logps"].mean(axis=0)
  return {
    "rows": len(source),
    "logps/chosen": float(chosen),
    "logps/rejected": float(rejected),
  }


def _columns(config, model, coder, source, mesh) -> dict[str, np.ndarray]:
  """Returns the columns id, logps and crc over all rows of a source."""
  batch, patches = config.batch, model.mllm.vision.num_patches
  examples = pipeline.in_order(
    source, coder, patches=patches, max_length=config.max_length
  )
  pieces = [examples[i : i + batch] for i in range(0, len(examples), batch)]
  layout = packing.layout_for(
    pieces,
    patches=patches,
    image_size=coder.image_size,
    shards=sharding.row_shards(mesh),
    max_length=config.max_length,
    row_tokens=config.pack.row,
  )
  params = sharding.place(model.params, mesh)
  score = objectives.pair_logps(model.mllm, chunk=config.chunk)
  status = metrics.Status(config.name, len(pieces))
  found: dict[str, tuple[float, float]] = {}
  for done, piece in enumerate(pieces, 1):
    piece = [
      dataclasses.replace(
        example, image=coder.pixels(source[done * batch - batch + i]["image"])
      )
      for i, example in enumerate(piece)
    ]
    rows = packing.place(piece, layout)
    packed = sharding.place_rows(packing.pack(piece, layout), mesh)
    logps = np.asarray(jax.device_get(score(params, packed)))
    for row, members in enumerate(rows):
      for pair, index in enumerate(members):
        found[piece[index].id] = tuple(logps[row, pair])
    status.show(done)
    train.stop_if_requested(config.name)
  return {
    "id": np.array([example.id for example in examples]),
    "logps": np.array([found[e.id] for e in examples], np.float32),
    "crc": np.array([pipeline.row_crc(example) for example in examples]),
  }
