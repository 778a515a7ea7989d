"""Reference log-probabilities as columns: DPO's reference model is data.

  c.reference = stage("score", inputs=dict(init="@stage1_full"), ...)

Scores every row of a preference set once with a fixed model and writes
`reference.npz` (id, logps [N, 2] float32: chosen and rejected, summed over the
answer's tokens, crc of the row's tokens) and `reference.json`, the fingerprint
of weights, template and tokenizer that a training stage compares with its own.
"""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pivot_jax import metrics, sharding, trees
from pivot_jax.data import coders, feed, layouts, opener, packing, streams
from pivot_jax.models import layers
from pivot_jax.training import loop, objectives, reference_logps
from pivot_jax.weights import checkpoint

# Parts that the model must have; looked for before anything runs.
NEEDS = (*checkpoint.PARTS, "tokenizer")


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Score all rows and return their number and mean log-probabilities."""
  compute = layers.Compute(**config.compute.to_dict())
  model = checkpoint.load_model(inputs["init"], needs=NEEDS, compute=compute)
  spec = config.sources[config.data].to_dict()
  coder = coders.coder_of(
    config.to_dict(),
    model.tokenizer,
    image_size=model.mllm.vision.image_size,
    patches=model.mllm.vision.num_patches,
    long=opener.long_rows(config.long, [spec]),
  )
  stream = streams.open_stream([(spec, 1.0)], coder, seed=config.data_seed)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    columns = _columns(config, model, coder, stream, mesh)
  made = reference_logps.made_with(
    trees.fingerprint(model.params), model.tokenizer, config
  )
  reference_logps.write(out, columns, made)
  chosen, rejected = columns["logps"].mean(axis=0)
  return {
    "rows": stream.rows(0),
    "logps/chosen": float(chosen),
    "logps/rejected": float(rejected),
  }


def _columns(config, model, coder, stream, mesh) -> dict[str, np.ndarray]:
  """Return the columns id, logps and crc over all pairs of a source."""
  batch, places = config.batch, stream.every()
  stream.measure(len(places))
  sizes = [stream.size_of(place) for place in places]
  starts = range(0, len(places), batch)
  layout = layouts.layout_for(
    [sizes[i : i + batch] for i in starts],
    patches=coder.patches,
    image_size=coder.image_size,
    shards=sharding.row_shards(mesh),
    row_tokens=config.pack.row,
  )
  params = sharding.place(model.params, mesh)
  score = objectives.pair_logps(model.mllm, chunk=config.chunk)
  status = metrics.Status(config.name, len(starts))
  columns: dict[str, list] = {"id": [], "logps": [], "crc": []}
  read = stream.read_all(places, threads=feed.threads(config.workers))
  for done in range(1, len(starts) + 1):
    piece = list(itertools.islice(read, batch))
    rows = packing.place(piece, layout)
    packed = sharding.place_rows(packing.pack(piece, layout), mesh)
    logps = np.asarray(jax.device_get(score(params, packed)))
    found: dict[int, np.ndarray] = {}
    for row, members in enumerate(rows):
      first = 0
      for index in members:
        last = first + piece[index].pairs
        found[index], first = logps[row, first:last], last
    for index, example in enumerate(piece):
      if example.void:
        # No image was seen, so that there is nothing to compare with.
        continue
      columns["id"] += example.pair_ids
      columns["logps"] += list(found[index])
      columns["crc"] += coders.pair_crcs(example)
    status.show(done)
    loop.stop_if_requested(config.name)
  return {
    "id": np.array(columns["id"]),
    "logps": np.array(columns["logps"], np.float32).reshape(-1, 2),
    "crc": np.array(columns["crc"]),
  }
