"""The linear probe: choosing lambda, ranks, prototypes and a whole run."""

import json
import logging

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn import linear_model, model_selection, neighbors

from pivot_jax import errors
from pivot_jax.data import opener
from pivot_jax.models import mllm
from pivot_jax.stages import linear_probe
from pivot_jax.weights import checkpoint
from tests.fixtures import tiny_models

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
  held_out = linear_probe.validation_split(labels, fraction=0.25, seed=3)
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
  held_out = linear_probe.validation_split(labels, fraction=0.25, seed=3)
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
  held_out = linear_probe.validation_split(labels, fraction=0.5, seed=0)
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
  labels = np.arange(50) % 5
  held, again, other = (
    linear_probe.validation_split(labels, fraction=0.2, seed=seed)
    for seed in (1, 1, 2)
  )
  assert held.sum() == 10
  assert (held == again).all() and (held != other).any()


def test_every_class_keeps_an_image_and_holds_one_out_if_it_has_two():
  # 1, 2, 3, 10 and 41 images of five classes, in an order of no class.
  labels = np.repeat(np.arange(5), [1, 2, 3, 10, 41])
  labels = np.random.default_rng(0).permutation(labels)
  for seed in range(20):
    held = linear_probe.validation_split(labels, fraction=0.1, seed=seed)
    assert np.bincount(labels[held]).tolist() == [0, 1, 1, 1, 4]
  most = linear_probe.validation_split(labels, fraction=0.99, seed=0)
  assert np.bincount(labels[~most]).tolist() == [1] * 5


def few(shots, seed, classes=12, width=24):
  """Return a few images a class, scales far apart, and many to test on."""
  rng = np.random.default_rng(seed)
  centres, scale = (
    3 * rng.normal(size=(classes, width)),
    rng.exponential(2, width),
  )

  def draw(count):
    noise = rng.normal(size=(count, classes, width)) * scale
    rows = (centres + noise).reshape(-1, width).astype(np.float32)
    return rows, np.tile(np.arange(classes), count)

  return *draw(shots), *draw(30)


@pytest.fixture
def warned(caplog, monkeypatch):
  """Return fn() -> the messages of warnings since the test began."""
  monkeypatch.setattr(logging.getLogger("pivot_jax"), "propagate", True)
  return lambda: [r.getMessage() for r in caplog.records if r.levelno >= 30]


GRID = np.geomspace(1e-2, 1e4, 7).tolist()


def chosen_of(features, labels, grid=GRID, fraction=0.1):
  held = linear_probe.validation_split(labels, fraction=fraction, seed=0)
  return held, *linear_probe.probe(
    features,
    labels,
    num_classes=int(labels.max()) + 1,
    lambdas=grid,
    held_out=held,
    tolerance=1e-5,
    max_iterations=2000,
  )


def test_one_image_a_class_takes_lambda_1_and_says_so(warned):
  features, labels, test, truth = few(1, 0)
  held, found, chosen = chosen_of(features, labels)
  assert not held.any()
  assert chosen["lambda"] == pytest.approx(1)
  assert chosen["chosen_by"] == "default" and not chosen["lambda_at_end"]
  (said,) = warned()
  assert "no class has two images" in said
  want = linear_model.LogisticRegression(C=1, tol=1e-8, max_iter=5000)
  want.fit(features.astype(np.float64), labels)
  accuracy = (found.scores(test).argmax(1) == truth).mean()
  assert accuracy == pytest.approx(want.score(test, truth), abs=0.01)
  # A grid without 1 gives the nearest there is.
  *_, chosen = chosen_of(features, labels, [1e-3, 20.0, 1e4])
  assert chosen["lambda"] == 20


@pytest.mark.parametrize("shots", [2, 5])
def test_few_images_a_class_choose_as_scikit_learn_on_a_stratified_split(shots):
  features, labels, test, truth = few(shots, 1)
  held, found, chosen = chosen_of(features, labels, fraction=1 / shots)
  theirs = model_selection.StratifiedShuffleSplit(
    n_splits=1, test_size=1 / shots, random_state=0
  )
  ((_, want_held),) = theirs.split(features, labels)
  # As many of each class as scikit-learn takes.
  assert (np.bincount(labels[held]) == np.bincount(labels[want_held])).all()
  scores = {}
  for lam in sorted(GRID, reverse=True):
    one = linear_model.LogisticRegression(C=1 / lam, max_iter=5000, tol=1e-8)
    one.fit(features[~held].astype(np.float64), labels[~held])
    scores[lam] = one.score(features[held], labels[held])
  assert chosen["chosen_by"] == "validation"
  assert scores[chosen["lambda"]] == max(scores.values())
  best = linear_model.LogisticRegression(C=1 / chosen["lambda"], max_iter=5000)
  best.fit(features.astype(np.float64), labels)
  accuracy = (found.scores(test).argmax(1) == truth).mean()
  assert accuracy == pytest.approx(best.score(test, truth), abs=0.01)


def test_lambdas_that_score_alike_give_1_and_a_warning(warned):
  centres = 100 * np.eye(3, 6, dtype=np.float32)
  labels = np.arange(30) % 3
  *_, chosen = chosen_of(centres[labels], labels, [1e-2, 1.0, 1e2])
  assert chosen["lambda"] == 1 and chosen["chosen_by"] == "default"
  (said,) = warned()
  assert "held-out accuracy 1," in said


def test_a_lambda_at_an_end_of_the_grid_is_told(warned):
  features, labels = blobs(400, 0)
  *_, chosen = chosen_of(features, labels, [1e2, 1e4, 1e6], fraction=0.5)
  assert chosen["lambda"] == 1e2 and chosen["lambda_at_end"]
  (said,) = warned()
  assert "100," in said and "end of the grid" in said
  # Of a single one there is nothing to say.
  *_, chosen = chosen_of(features, labels, [1e2])
  assert chosen["chosen_by"] == "given" and not chosen["lambda_at_end"]
  assert len(warned()) == 1


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
  module = mllm.MLLM(llm=tiny_models.LLM, vision=tiny_models.VISION)
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
    for field in ("lambda", "lambda_at_end"):
      assert found[f"{kind}/{field}"] == chosen[kind][field]


def test_a_detached_encoder_gives_what_the_whole_model_gives(
  model, tmp_path, monkeypatch
):
  cut = {k: model.params[k] for k in ("vision", "projector")}
  alone = checkpoint.Model(
    mllm.MLLM(llm=None, vision=tiny_models.VISION), cut, None, {}
  )
  results = []
  for name, one in (("whole", model), ("cut", alone)):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, m=one, **__: m)
    results.append(linear_probe.run(config(), {"init": "x"}, tmp_path / name))
  assert results[0] == results[1]


def test_no_projector_means_no_projector_numbers(model, tmp_path, monkeypatch):
  alone = checkpoint.Model(
    mllm.MLLM(llm=None, vision=tiny_models.VISION),
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
  monkeypatch.setattr(opener, "open_source", lambda _: [])
  with pytest.raises(errors.InputError, match="linear_probe: the data"):
    linear_probe.run(config(), {"init": "x"}, tmp_path)


def test_data_of_one_class_is_refused(model, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: model)
  opened = opener.open_source

  class OneClass:
    def __init__(self, spec):
      self.source = opened(spec)

    def __len__(self):
      return len(self.source)

    def __getitem__(self, index):
      return self.source[index] | {"label": 7}

    def name(self, index):
      return f"labels.parquet:{index}"

  monkeypatch.setattr(opener, "open_source", OneClass)
  with pytest.raises(errors.InputError, match="labels.parquet.* label 7:"):
    linear_probe.run(config(), {"init": "x"}, tmp_path / "out")
