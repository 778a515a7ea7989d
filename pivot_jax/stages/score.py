"""Reference log-probabilities as columns: DPO's reference model is data.

  c.reference = stage("score", inputs=dict(init="@stage1_full"), ...)

Scores every row of a preference set once with a fixed model and writes
`reference.npz` (id, logps [N, 2] float32: chosen and rejected, summed over the
answer's tokens, crc of the row's tokens) and `reference.json`, the fingerprint
of weights, template and tokenizer that a training stage compares with its own.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pivot_jax import metrics, processes, sharding
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
  stream = processes.in_turn(
    "lengths",
    lambda: streams.open_stream([(spec, 1.0)], coder, seed=config.data_seed),
  )
  feed.check_processes(stream)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    columns = _columns(config, model, coder, stream, mesh)
  made = reference_logps.made_with(
    sharding.fingerprint(model.params), model.tokenizer, config
  )
  if processes.first():
    reference_logps.write(out, columns, made)
  chosen, rejected = columns["logps"].mean(axis=0)
  return {
    "rows": stream.rows(0),
    "logps/chosen": float(chosen),
    "logps/rejected": float(rejected),
  }


def _columns(config, model, coder, stream, mesh) -> dict[str, np.ndarray]:
  """Return the columns id, logps and crc over all pairs of a source."""
  share, places = feed.Share.of(mesh), stream.every()
  processes.in_turn("lengths", lambda: stream.measure(len(places)))
  batch = -(-config.batch // share.count) * share.count
  pieces = [places[i : i + batch] for i in range(0, len(places), batch)]
  own = [
    [piece[i] for i in share.of_batch(len(piece), batch)] for piece in pieces
  ]
  layout = layouts.layout_for(
    _all_sizes(own, stream, share),
    patches=coder.patches,
    image_size=coder.image_size,
    shards=-(-sharding.row_shards(mesh) // share.count),
    row_tokens=config.pack.row,
  )
  params = sharding.place(model.params, mesh)
  score = objectives.pair_logps(model.mllm, chunk=config.chunk)
  status = metrics.Status(config.name, len(pieces))
  found = []
  read = stream.read_all(sum(own, []), threads=feed.threads(config.workers))
  for done, members in enumerate(own, 1):
    processes.beat("reading rows of batch", done)
    piece = list(itertools.islice(read, len(members)))
    slow = processes.SLOW if done == 1 else 0.0
    processes.beat("scoring batch", done, allow=slow)
    packed = packing.pack(piece, layout) if piece else packing.empty(layout)
    logps = score(params, sharding.place_rows(packed, mesh))
    found.append(_of_batch(piece, layout, sharding.own_rows(logps, mesh)))
    status.show(done)
    loop.stop_if_requested(config.name)
  feed.check_bad(stream)
  return _in_order(found, share)


def _all_sizes(own, stream, share) -> list[list[layouts.Size]]:
  """Return the sizes of the examples of all shares, by batch and share."""
  sizes = []
  for number, piece in enumerate(own, 1):
    processes.beat("reading the sizes of batch", number)
    sizes.append([stream.size_of(place) for place in piece])
  return [
    [layouts.Size(*one) for one in piece]
    for pieces in share.of_all("sizes", sizes)
    for piece in pieces
    if piece
  ]


def _of_batch(piece, layout, logps: np.ndarray) -> dict[str, list]:
  """Return the columns of the examples of a batch, in their order."""
  found: dict[int, np.ndarray] = {}
  for row, members in enumerate(packing.place(piece, layout)):
    first = 0
    for index in members:
      last = first + piece[index].pairs
      found[index], first = logps[row, first:last], last
  columns: dict[str, list] = {"id": [], "logps": [], "crc": []}
  for index, example in enumerate(piece):
    if example.void:
      # No image was seen, so that there is nothing to compare with.
      continue
    columns["id"] += example.pair_ids
    columns["logps"] += found[index].tolist()
    columns["crc"] += coders.pair_crcs(example)
  return columns


def _in_order(found: Sequence[dict[str, list]], share: feed.Share):
  """Return the columns of all rows as arrays, in the order of the source."""
  columns: dict[str, list] = {"id": [], "logps": [], "crc": []}
  for batches in zip(*share.of_all("columns", found), strict=True):
    for one in batches:
      for name in columns:
        columns[name] += one[name]
  return {
    "id": np.array(columns["id"]),
    "logps": np.array(columns["logps"], np.float32).reshape(-1, 2),
    "crc": np.array(columns["crc"]),
  }
