"""A whole run of the segmentation probe on scenes and a random encoder."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from pivot_jax import errors, sharding
from pivot_jax.data import opener
from pivot_jax.data.scenes import scenes
from pivot_jax.evals import segmentation
from pivot_jax.models import mllm, vit
from pivot_jax.stages import segment_probe
from pivot_jax.weights import checkpoint

VISION = vit.VisionConfig(
  image_size=48,
  patch_size=8,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
)


def config(**fields):
  def source(split, size):
    return dict(kind="scenes", task="segment", split=split, size=size)

  return ConfigDict(
    dict(
      name="segment_probe",
      data=(("a", 1.0), ("b", 1.0)),
      sources=dict(a=source("probe_train", 24), b=source("probe_test", 13)),
      compute=dict(dtype="float32", remat="none", scan=False),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      resample="bicubic",
      batch=8,
      epochs=3,
      hidden=32,
      lr=1e-2,
      lr_min=1e-3,
      warmup=3,
      weight_decay=0.01,
      num_classes=11,
      background=0,
      ignore=-1,
      resamples=50,
      examples=6,
      seed=0,
    )
    | fields
  )


@pytest.fixture(scope="module", autouse=True)
def encoder():
  module = mllm.MLLM(llm=None, vision=VISION)
  params = mllm.init_params(module, jax.random.key(0))
  model = checkpoint.Model(module, params, None, {})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint, "load_model", lambda *_, **__: model)
    yield


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory):
  out = tmp_path_factory.mktemp("probe")
  return segment_probe.run(config(), {"init": "x"}, out), out


def test_the_headline_is_the_last_epoch_and_the_best_stands_beside(finished):
  found, out = finished
  epochs = json.loads((out / "epochs.json").read_text())["epochs"]
  recalls = [epoch["macro_recall"] for epoch in epochs]
  assert len(recalls) == 3
  assert found["macro_recall"]["value"] == recalls[-1]
  assert found["macro_recall_best_epoch"]["value"] == max(recalls)
  assert found["best_epoch"] == 1 + int(np.argmax(recalls))
  assert found["miou"]["n"] == 13 and found["miou"]["se"] > 0


def test_the_counts_of_the_file_give_the_metrics(finished):
  found, out = finished
  with np.load(out / "counts.npz") as file:
    assert len(set(file["id"])) == 13
    fields = {n: file[n] for n in segmentation.Counts._fields}
  scores = segmentation.scores(
    segmentation.total(segmentation.Counts(**fields))
  )
  for name, value in scores.items():
    assert found[name]["value"] == value


def test_the_maps_are_examples_of_the_test_split(finished):
  _, out = finished
  with np.load(out / "maps.npz") as maps:
    assert maps["images"].shape == (6, 48, 48, 3)
    assert maps["images"].dtype == np.uint8
    assert maps["labels"].shape == maps["predicted"].shape == (6, 48, 48)
    blocks = maps["predicted"].reshape(6, 6, 8, 6, 8)
    assert (blocks == blocks[:, :, :1, :, :1]).all()


def test_more_images_a_batch_than_there_are_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match="batch=25 is more than the 24"):
    segment_probe.run(config(batch=25), {"init": "x"}, tmp_path)


def test_a_class_beyond_the_config_is_refused_by_row(tmp_path, monkeypatch):
  class Source(list):
    def name(self, index):
      return f"folder#{index}"

  rows = [dict(scenes.Scenes(task="segment", size=2)[i]) for i in range(2)]
  rows[0]["labels"] = np.zeros((48, 48), np.int32)
  rows[1]["labels"] = np.full((48, 48), 255, np.int32)
  opened = Source(rows)
  monkeypatch.setattr(opener, "open_source", lambda _: opened)
  with pytest.raises(errors.InputError, match="folder#1: labels .* class 255"):
    segment_probe.run(config(), {"init": "x"}, tmp_path)


def test_a_gap_in_the_labels_is_told_in_the_log(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  rows = [dict(scenes.Scenes(task="segment", size=8)[i]) for i in range(8)]
  for row in rows:
    row["labels"] = np.where(row["labels"] > 2, 255, row["labels"])
  monkeypatch.setattr(opener, "open_source", lambda _: rows)
  segment_probe.run(config(num_classes=0), {"init": "x"}, tmp_path)
  (said,) = [m for m in caplog.messages if "255" in m]
  assert "256 classes" in said and "segment_ignore=255" in said
  caplog.clear()
  segment_probe.run(config(num_classes=0, ignore=255), {"init": "x"}, tmp_path)
  assert not [m for m in caplog.messages if "255" in m]


def test_a_negative_label_alone_is_named_and_counts_as_no_class(
  tmp_path, monkeypatch
):
  rows = [dict(scenes.Scenes(task="segment", size=8)[i]) for i in range(8)]
  for row in rows:
    row["labels"] = np.full(row["labels"].shape, -1, np.int32)
  counted = config(num_classes=0, ignore=255)
  with monkeypatch.context() as patch:
    patch.setattr(opener, "open_source", lambda _: rows)
    assert segment_probe._counted(counted).num_classes == 1


def test_the_best_epoch_is_the_first_of_the_highest_recall():
  def epoch(hits):
    one = np.array([[hits], [hits]])
    rest = 4 - one
    zeros = np.zeros_like(one)
    counts = segmentation.Counts(
      one, rest, zeros, one[:, 0], one[:, 0] * 0 + 4, one, one, one
    )
    scores = segmentation.scores(segmentation.total(counts))
    return segment_probe.Epoch(counts, scores)

  found = segment_probe.summarize(
    [epoch(1), epoch(3), epoch(3), epoch(2)], resamples=5, seed=0
  )
  assert found["best_epoch"] == 2
  assert found["macro_recall"]["value"] == 0.5
  assert found["macro_recall_best_epoch"]["value"] == 0.75


def test_a_resize_of_the_features_is_left_out():
  module = mllm.MLLM(
    llm=None, vision=dataclasses.replace(VISION, feature_tokens=16)
  )
  params = mllm.init_params(module, jax.random.key(0))
  mesh = sharding.make_mesh({"data": -1})
  found = [
    segment_probe.extract(
      config(),
      checkpoint.Model(module.clone(vision=vision), params, None, {}),
      config().sources.b.to_dict(),
      mesh,
    )
    for vision in (VISION, module.vision)
  ]
  assert found[1].features.shape == (13, 36, 16)
  np.testing.assert_array_equal(found[0].features, found[1].features)
