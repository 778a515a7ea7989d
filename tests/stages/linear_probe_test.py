"""The linear probe: choosing lambda, ranks, prototypes and a whole run."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn import linear_model, neighbors

from pivot_jax import checkpoint, errors
from pivot_jax.models import mllm
from pivot_jax.stages import linear_probe
from tests.models import tiny

SETTINGS = dict(lambdas=[1e-2, 1.0, 1e2], tolerance=1e-7, max_iterations=1000)


def blobs(count, seed, classes=4, width=10):
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(99).normal(size=(classes, width))
  labels = rng.integers(0, classes, count)
  noise = rng.normal(size=(count, width))
  return (centres[labels] + noise).astype(np.float32), labels


def test_the_probe_is_scikit_learn_at_the_chosen_lambda_on_all_of_train():
  features, labels = blobs(240, 0)
  test, truth = blobs(200, 1)
  held_out = linear_probe.validation_split(240, fraction=0.25, seed=3)
  found, chosen = linear_probe.probe(
    features, labels, num_classes=4, held_out=held_out, **SETTINGS
  )
  want = linear_model.LogisticRegression(
    C=1 / chosen["lambda"], tol=1e-8, max_iter=5000
  ).fit(features.astype(np.float64), labels)
  np.testing.assert_allclose(found.weights.T, want.coef_, atol=1e-4)
  accuracy = (found.scores(test).argmax(1) == truth).mean()
  assert accuracy == want.score(test, truth)


def test_lambda_is_that_of_the_best_held_out_accuracy():
  features, labels = blobs(240, 0)
  held_out = linear_probe.validation_split(240, fraction=0.25, seed=3)
  _, chosen = linear_probe.probe(
    features, labels, num_classes=4, held_out=held_out, **SETTINGS
  )
  scores = {}
  for lam in sorted(SETTINGS["lambdas"], reverse=True):
    model = linear_model.LogisticRegression(C=1 / lam, max_iter=5000, tol=1e-8)
    model.fit(features[~held_out], labels[~held_out])
    scores[lam] = model.score(features[held_out], labels[held_out])
  assert chosen["lambda"] == max(scores, key=scores.get)
  path = {p["lambda"]: p["validation_top1"] for p in chosen["path"]}
  assert path == pytest.approx(scores)


def test_held_out_labels_do_not_reach_the_path():
  features, labels = blobs(120, 0)
  held_out = linear_probe.validation_split(120, fraction=0.5, seed=0)
  spoilt = np.where(held_out, 0, labels)
  run = [
    linear_probe.probe(
      features, y, num_classes=4, held_out=held_out, **SETTINGS
    )
    for y in (labels, spoilt)
  ]
  paths = [[p["iterations"] for p in chosen["path"]] for _, chosen in run]
  assert paths[0] == paths[1]


def test_the_split_has_its_size_and_follows_its_seed():
  held = linear_probe.validation_split(50, fraction=0.2, seed=1)
  again = linear_probe.validation_split(50, fraction=0.2, seed=1)
  other = linear_probe.validation_split(50, fraction=0.2, seed=2)
  assert held.sum() == 10
  assert (held == again).all() and (held != other).any()


def test_ranks_by_hand():
  scores = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 4.0]])
  assert linear_probe.ranks(scores, np.array([0, 1, 0])).tolist() == [0, 1, 2]


def test_prototypes_are_the_nearest_class_mean():
  features, labels = blobs(200, 0)
  test, _ = blobs(100, 1)
  found = linear_probe.prototypes(features, labels, num_classes=4)
  want = neighbors.NearestCentroid().fit(features, labels).predict(test)
  assert (found.scores(test).argmax(1) == want).all()


def test_a_class_without_examples_is_never_predicted():
  features, labels = blobs(60, 0)
  found = linear_probe.prototypes(features, labels, num_classes=6)
  assert found.scores(features).argmax(1).max() < 4


def test_top5_is_left_out_below_five_classes_and_errors_are_binomial():
  rank = np.array([0, 0, 0, 6])
  few = linear_probe.accuracies("encoder", rank, rank, 4)
  many = linear_probe.accuracies("encoder", rank, rank, 8)
  assert set(few) == {"encoder/top1", "encoder/prototype_top1"}
  assert many["encoder/top5"]["value"] == 0.75
  assert few["encoder/top1"] == {
    "value": 0.75,
    "n": 4,
    "se": pytest.approx((0.75 * 0.25 / 4) ** 0.5),
  }


def config(size=48, **fields):
  def source(split):
    return dict(kind="scenes", task="classify", split=split, size=size)

  return ConfigDict(
    dict(
      name="linear_probe",
      data=(("a", 1.0), ("b", 1.0)),
      sources=dict(a=source("probe_train"), b=source("probe_test")),
      compute=dict(dtype="float32", remat="none", scan=False),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      resample="bicubic",
      batch=20,
      lambdas=(1e-2, 1e2, 3),
      validation=0.25,
      tolerance=1e-7,
      max_iterations=200,
      seed=0,
    )
    | fields
  )


@pytest.fixture(scope="module")
def model():
  module = mllm.MLLM(llm=tiny.LLM, vision=tiny.VISION)
  params = mllm.init_params(module, jax.random.key(0))
  return checkpoint.Model(module, params, None, {})


def test_a_run_measures_encoder_and_projector_item_by_item(
  model, tmp_path, monkeypatch
):
  monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: model)
  found = linear_probe.run(config(), {"init": "x"}, tmp_path / "out")
  items = np.load(tmp_path / "out" / "predictions.npz")
  chosen = json.loads((tmp_path / "out" / "path.json").read_text())
  for kind in ("encoder", "projector"):
    assert found[f"{kind}/top1"]["n"] == 48
    correct = items[f"{kind}_correct"]
    assert found[f"{kind}/top1"]["value"] == correct.mean()
    agree = items[f"{kind}_prediction"] == items["label"]
    assert (agree == correct).all()
    assert len(chosen[kind]["path"]) == 3


def test_a_detached_encoder_gives_what_the_whole_model_gives(
  model, tmp_path, monkeypatch
):
  cut = {k: model.params[k] for k in ("vision", "projector")}
  alone = checkpoint.Model(
    mllm.MLLM(llm=None, vision=tiny.VISION), cut, None, {}
  )
  results = []
  for name, one in (("whole", model), ("cut", alone)):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, m=one, **__: m)
    results.append(linear_probe.run(config(), {"init": "x"}, tmp_path / name))
  assert results[0] == results[1]


def test_no_projector_means_no_projector_numbers(model, tmp_path, monkeypatch):
  alone = checkpoint.Model(
    mllm.MLLM(llm=None, vision=tiny.VISION),
    {"vision": model.params["vision"]},
    None,
    {},
  )
  monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: alone)
  found = linear_probe.run(config(), {"init": "x"}, tmp_path)
  assert not [name for name in found if "projector" in name]


def test_features_do_not_depend_on_the_batch(model, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: model)
  results = [
    linear_probe.run(config(batch=size), {"init": "x"}, tmp_path / str(size))
    for size in (48, 32)
  ]
  assert results[0] == results[1]


def test_empty_data_is_named(model, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: model)
  monkeypatch.setattr(linear_probe.registry, "open_source", lambda _: [])
  with pytest.raises(errors.InputError, match="linear_probe: the data"):
    linear_probe.run(config(), {"init": "x"}, tmp_path)
