"""Segmentation probe: a two-layer head on frozen patch features.

  c.segment_probe_dpo = stage("segment_probe", inputs=dict(init="@detach_dpo"))

For what a vision encoder knows patch by patch: paper.md 5.2. The encoder is run
once; the head alone is trained. It makes no pixel-sharp segmentation: a patch
gets one multi-label prediction, and its best class stands for its pixels in
the mean IoU. Features and counts of all images are held in host memory.
What is counted and scored is segmentation.py's.
Legend: N images, P patches, D feature width, C classes.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from pivot_jax import errors, files, metrics, processes, sharding
from pivot_jax.data import feed, opener
from pivot_jax.data.sources import folders
from pivot_jax.evals import features, segmentation
from pivot_jax.models import heads, layers
from pivot_jax.training import loop
from pivot_jax.weights import checkpoint

LOG = logging.getLogger("pivot_jax")
# Parts that the model must have; looked for before anything runs.
NEEDS = ("vision",)


class Split(NamedTuple):
  """The frozen features of a data set, and its labels counted by patch.

  `images` and `labels` are those of the first few rows that this process read,
  whose numbers are `shown`, for pictures.
  """

  ids: tuple[str, ...]
  features: Float[np.ndarray, "N P D"]
  histogram: Int[np.ndarray, "N P C"]
  images: UInt8[np.ndarray, "K H W 3"]
  labels: Int[np.ndarray, "K H W"]
  shown: tuple[int, ...]


class Epoch(NamedTuple):
  """The evaluation after an epoch: counts per image, scores over all."""

  counts: segmentation.Counts
  scores: Mapping[str, float]


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Train and score the head on the encoder of `inputs["init"]`.

  Returns `macro_recall`, `accuracy`, `precision`, `f1` and `miou` of the last
  epoch, n being images; and `macro_recall_best_epoch` with `best_epoch` (from
  1), which the paper reports although it is chosen on the evaluation data.
  Writes `counts.npz` (`id`, and per image the fields of segmentation.Counts of
  the last epoch, for paired comparisons), `epochs.json` (scores of each epoch;
  recall and IoU by class of the last) and `maps.npz` (`images`, `labels`,
  `predicted`: a few rows, cut to the pixels that patches cover).
  """
  config = _counted(config)
  model = checkpoint.load_model(
    inputs["init"],
    needs=NEEDS,
    compute=layers.Compute(**config.compute.to_dict()),
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    train, test = (
      extract(config, model, config.sources[name].to_dict(), mesh)
      for name, _ in config.data
    )
  recipe = segmentation.Recipe(
    **{f.name: config[f.name] for f in dataclasses.fields(segmentation.Recipe)}
  )
  if len(train.ids) < recipe.batch:
    raise errors.InputError(
      f"{config.name}: batch={recipe.batch} is more than the {len(train.ids)} "
      "training images: lower it or give more images"
    )
  head = heads.SegmentationHead(
    config.hidden, config.num_classes, model.mllm.compute
  )
  params, epochs = _train(config, head, recipe, train, test)
  if processes.first():
    files.make_folder(out)
    shown = segmentation.predict(
      head, params, test.features[list(test.shown)], batch=config.batch
    )
    side = model.mllm.vision.patch_size
    _write(out, test, segmentation.pixel_classes(shown, patch=side), epochs)
  return summarize(epochs, resamples=config.resamples, seed=config.seed)


def _train(config, head, recipe, train: Split, test: Split):
  """Return the last parameters of the head, and all epochs' evaluations."""
  background = _optional(config.background)
  epochs: list[Epoch] = []
  for params in segmentation.train_head(
    head,
    train.features,
    segmentation.patch_targets(train.histogram, background=background),
    train.histogram.any(axis=-1),
    recipe=recipe,
    seed=config.seed,
  ):
    counts = segmentation.evaluate(
      head,
      params,
      test.features,
      test.histogram,
      background=background,
      batch=config.batch,
    )
    scores = segmentation.scores(segmentation.total(counts))
    epochs.append(Epoch(counts, scores))
    processes.beat("training the head, epoch", len(epochs))
    loop.stop_if_requested(config.name)
  return params, epochs


def summarize(
  epochs: Sequence[Epoch], *, resamples: int, seed: int
) -> dict[str, Any]:
  """Return the metrics of the last epoch, and those of the best beside."""

  def measured(
    epoch: Epoch, name: str, found: Mapping[str, float]
  ) -> metrics.Measured:
    images = len(epoch.counts.right)
    return metrics.measured(epoch.scores[name], images, found[name])

  def standard_errors(epoch: Epoch) -> dict[str, float]:
    return segmentation.standard_errors(
      epoch.counts, resamples=resamples, seed=seed
    )

  last = epochs[-1]
  best = max(range(len(epochs)), key=lambda i: epochs[i].scores["macro_recall"])
  last_errors = standard_errors(last)
  found = {name: measured(last, name, last_errors) for name in last.scores}
  found["macro_recall_best_epoch"] = measured(
    epochs[best], "macro_recall", standard_errors(epochs[best])
  )
  return found | {"best_epoch": best + 1}


def extract(
  config: ConfigDict,
  model: checkpoint.Model,
  spec: Mapping[str, Any],
  mesh: jax.sharding.Mesh,
) -> Split:
  """Return the encoder's features and the patch labels of a source."""
  # Labels are by patch, so that a resize of the features is skipped.
  vision = dataclasses.replace(model.mllm.vision, feature_tokens=0)
  ids, found, histograms, shown = [], [], [], []
  share = feed.Share.of(mesh)
  for batch in features.read(
    config,
    spec,
    model.mllm.clone(llm=None, vision=vision),
    {"vision": model.params["vision"]},
    encode=features.by_patch,
    frame=feed.images_and_maps,
    mesh=mesh,
  ):
    _check_classes(batch, config)
    histograms.append(share.rows_of_all(_histogram(batch, config, vision)))
    found.append(batch.features["encoder"])
    ids += sum(share.of_all("ids", [row["id"] for row in batch.rows]), [])
    triples = list(zip(batch.images, batch.labels, batch.places))
    shown += triples[: config.examples - len(shown)]
  pictures, maps, places = zip(*shown) if shown else ((), (), ())
  return Split(
    ids=tuple(ids),
    features=np.concatenate(found),
    histogram=np.concatenate(histograms),
    images=np.array(pictures),
    labels=np.array(maps),
    shown=places,
  )


def _histogram(batch: features.Batch, config, vision) -> np.ndarray:
  """Return the labels of the batch's rows counted by patch."""
  if not batch.rows:
    return np.zeros(0, np.uint16)
  return segmentation.patch_histogram(
    batch.labels,
    patch=vision.patch_size,
    num_classes=config.num_classes,
    ignore=_optional(config.ignore),
  )


def _write(out, test, predicted, epochs) -> None:
  """Write the counts, the epochs and the example maps of a run."""
  counts = epochs[-1].counts
  rows = {"id": np.array(test.ids), **counts._asdict()}
  files.save_arrays(out / "counts.npz", rows, compressed=True)
  held = segmentation.by_class(segmentation.total(counts))
  record = {
    "epochs": [{k: float(v) for k, v in e.scores.items()} for e in epochs],
    "classes": {name: _nullable(values) for name, values in held.items()},
  }
  files.write_json(out / "epochs.json", record)
  height, width = predicted.shape[1:]
  maps = {
    "images": test.images[:, :height, :width],
    "labels": test.labels[:, :height, :width],
    "predicted": predicted,
  }
  files.save_arrays(out / "maps.npz", maps, compressed=True)


def _nullable(values):
  """Return a list with None for NaN, which JSON does not have."""
  return [None if np.isnan(value) else float(value) for value in values]


def _optional(index: int | str) -> int | None:
  """Return a class index of the config, None where it is -1 or "none"."""
  if index == "none":
    return None
  return None if int(index) < 0 else int(index)


def _counted(config: ConfigDict) -> ConfigDict:
  """Return the config with `num_classes`, where it is 0, read off the data."""
  if config.num_classes:
    return config
  found: set[int] = set()
  for name, _ in config.data:
    source = opener.open_source(config.sources[name].to_dict())
    for index in range(processes.index(), len(source), processes.count()):
      processes.beat("reading row", index)
      labels = np.unique(source[index]["labels"])
      found |= {*labels[labels != config.ignore].tolist()}
  found = set(sum(processes.exchange("classes", sorted(found)), []))
  # A negative label is no class; reading the maps names its row.
  classes = max(found | {0}) + 1
  odd = folders.label_gap(found, config.ignore)
  if odd:
    LOG.warning("%s: %d classes: %s", config.name, classes, odd)
  counted = config.copy_and_resolve_references()
  counted.num_classes = classes
  return counted


def _check_classes(batch: features.Batch, config: ConfigDict) -> None:
  """Raise InputError for a class beyond those there are, with its row."""
  for place, labels in enumerate(batch.labels):
    known = (labels >= 0) & (labels < config.num_classes)
    wrong = labels[~known & (labels != config.ignore)]
    if wrong.size:
      raise errors.InputError(
        f"{batch.name(place)}: labels holds class {wrong[0]}, beyond "
        f"num_classes={config.num_classes}: raise it, or name the class in "
        "`ignore`"
      )
