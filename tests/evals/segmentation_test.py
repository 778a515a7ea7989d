"""Patch labels, head training and scores, by hand and against scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn import metrics

from pivot_jax.evals import segmentation
from pivot_jax.models import heads, layers

RNG = np.random.default_rng(0)
RECIPE = segmentation.Recipe(
  batch=8, epochs=12, lr=3e-2, lr_min=1e-3, warmup=4, weight_decay=0.01
)


def histogram(labels, *, classes=4, ignore=None, patch=2):
  return segmentation.patch_histogram(
    np.asarray(labels)[None], patch=patch, num_classes=classes, ignore=ignore
  )[0]


def targets(labels, *, background=0, **fields):
  found = histogram(labels, **fields)[None]
  return segmentation.patch_targets(found, background=background)[0]


def set_classes(labels, **fields):
  return [np.flatnonzero(p).tolist() for p in targets(labels, **fields)]


TWO_PATCHES = [[0, 3, 0, 0], [0, 0, 0, 0]]


def test_a_patch_of_background_and_another_class_has_the_other_alone():
  assert set_classes(TWO_PATCHES) == [[3], [0]]


def test_without_a_background_both_classes_are_set():
  assert set_classes(TWO_PATCHES, background=None) == [[0, 3], [0]]


def test_two_classes_that_are_not_background_are_both_set():
  assert set_classes([[1, 3], [0, 1]]) == [[1, 3]]


def test_ignored_pixels_do_not_count():
  labels = [[255, 3, 255, 255], [255, 255, 255, 255]]
  assert set_classes(labels, ignore=255) == [[3], []]
  assert histogram(labels, ignore=255).sum(axis=-1).tolist() == [1, 0]


def test_pixels_that_no_patch_covers_do_not_count():
  labels = np.ones((5, 5), int)
  labels[4] = labels[:, 4] = 2
  assert histogram(labels).tolist() == [[0, 4, 0, 0]] * 4


def test_patches_are_in_reading_order():
  labels = np.arange(4).reshape(2, 2).repeat(2, 0).repeat(2, 1)
  assert set_classes(labels) == [[0], [1], [2], [3]]


def random_case(images=6, side=3, patch=4, classes=5):
  labels = RNG.integers(0, classes, (images, side, side))
  labels = labels.repeat(patch, 1).repeat(patch, 2)
  noise = RNG.random(labels.shape) < 0.02
  labels = np.where(noise, RNG.integers(0, classes, labels.shape), labels)
  labels[labels == 4] = 3  # A class that is never there.
  labels[RNG.random(labels.shape) < 0.1] = 9
  labels[0, :patch, :patch] = 9
  logits = RNG.normal(size=(images, side * side, classes)).astype(np.float32)
  found = segmentation.patch_histogram(
    labels, patch=patch, num_classes=classes, ignore=9
  )
  return labels, logits, found


def test_patch_scores_are_scikit_learns():
  _, logits, found = random_case()
  counts = segmentation.count(logits, found, background=0)
  scores = segmentation.scores(segmentation.total(counts))
  valid = found.any(axis=-1)
  assert not valid.all()
  truth = segmentation.patch_targets(found, background=0)[valid]
  said = logits[valid] > 0
  held = np.flatnonzero(truth.any(axis=0))
  assert held.tolist() == [0, 1, 2, 3]
  choice = dict(labels=held, average="macro", zero_division=0)
  want = {
    "macro_recall": metrics.recall_score(truth, said, **choice),
    "precision": metrics.precision_score(truth, said, **choice),
    "f1": metrics.f1_score(truth, said, **choice),
    "accuracy": (truth == said).mean(),
  }
  for name, value in want.items():
    assert scores[name] == pytest.approx(value, abs=1e-12), name


def test_mean_iou_is_that_of_the_upsampled_best_class():
  labels, logits, found = random_case()
  counts = segmentation.count(logits, found, background=0)
  predicted = segmentation.pixel_classes(logits, patch=4)
  keep = labels != 9
  overlaps = []
  for index in range(4):
    true, said = (labels == index) & keep, (predicted == index) & keep
    overlaps.append((true & said).sum() / (true | said).sum())
  scores = segmentation.scores(segmentation.total(counts))
  assert scores["miou"] == pytest.approx(np.mean(overlaps), abs=1e-12)
  by_class = segmentation.by_class(segmentation.total(counts))
  np.testing.assert_allclose(by_class["iou"][:4], overlaps)
  assert np.isnan(by_class["iou"][4]) and np.isnan(by_class["recall"][4])


def test_a_perfect_prediction_scores_one():
  _, _, found = random_case()
  logits = np.where(segmentation.patch_targets(found, background=0), 5.0, -5.0)
  counts = segmentation.count(logits, found, background=0)
  scores = segmentation.scores(segmentation.total(counts))
  for name in ("macro_recall", "precision", "f1", "accuracy"):
    assert scores[name] == 1.0


def test_the_bootstrap_error_of_a_mean_is_the_textbooks():
  # One decision per image: the accuracy is a mean of independent trials.
  right = (np.arange(400) % 4 == 0).astype(int)
  zeros = np.zeros((400, 1), int)
  counts = segmentation.Counts(
    *[zeros] * 3, right, np.ones(400, int), *[zeros] * 3
  )
  found = segmentation.standard_errors(counts, resamples=2000, seed=0)
  assert found["accuracy"] == pytest.approx(
    (0.25 * 0.75 / 400) ** 0.5, rel=0.06
  )
  again = segmentation.standard_errors(counts, resamples=2000, seed=0)
  assert found == again


def test_the_rate_warms_up_and_then_follows_a_cosine_that_ran_from_the_start():
  recipe = segmentation.Recipe(
    batch=1, epochs=1, lr=1e-3, lr_min=1e-4, warmup=10, weight_decay=0.0
  )
  rates = [float(segmentation.learning_rate(t, recipe, 40)) for t in range(41)]
  assert rates[0] == 0.0
  assert rates[5] == pytest.approx(5e-4)
  # Halfway the cosine is at the middle of the two rates.
  assert rates[20] == pytest.approx(5.5e-4)
  quarter = 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi / 4))
  assert rates[10] == pytest.approx(quarter)
  assert rates[40] == pytest.approx(1e-4)


def test_the_loss_is_the_mean_over_valid_patches_and_classes():
  logits = RNG.normal(size=(2, 3, 4))
  truth = RNG.random((2, 3, 4)) < 0.5
  valid = np.array([[True, True, False], [True, False, True]])
  p = 1 / (1 + np.exp(-logits))
  terms = -np.where(truth, np.log(p), np.log(1 - p))
  found = segmentation.loss(logits, truth, valid)
  assert float(found) == pytest.approx(terms[valid].mean(), rel=1e-5)


def problem(images=32, patches=9, width=6, classes=3):
  mixing = np.random.default_rng(5).normal(size=(width, classes))
  features = RNG.normal(size=(images, patches, width)).astype(np.float32)
  return features, (features @ mixing) > 0.5


def trained(features, truth, valid=None, seed=0):
  head = heads.SegmentationHead(16, truth.shape[-1], layers.Compute())
  valid = np.ones(truth.shape[:2], bool) if valid is None else valid
  return head, list(
    segmentation.train_head(
      head, features, truth, valid, recipe=RECIPE, seed=seed
    )
  )


def test_training_learns_what_the_features_hold():
  features, truth = problem()
  head, epochs = trained(features, truth)
  every = np.ones(truth.shape[:2], bool)
  losses = [
    float(segmentation.loss(head.apply({"params": p}, features), truth, every))
    for p in epochs
  ]
  assert len(epochs) == RECIPE.epochs
  assert losses[-1] < 0.6 * losses[0]


def test_invalid_patches_do_not_train():
  features, truth = problem()
  valid = RNG.random(truth.shape[:2]) < 0.7
  spoilt = np.where(valid[..., None], truth, ~truth)
  _, one = trained(features, truth, valid)
  _, two = trained(features, spoilt, valid)
  for a, b in zip(jax.tree.leaves(one[-1]), jax.tree.leaves(two[-1])):
    np.testing.assert_array_equal(a, b)


def test_another_seed_is_another_head_and_the_same_seed_the_same():
  features, truth = problem()
  one, again, other = (
    jax.tree.leaves(trained(features, truth, seed=seed)[1][-1])
    for seed in (0, 0, 1)
  )
  assert all((a == b).all() for a, b in zip(one, again))
  assert any((a != b).any() for a, b in zip(one, other))


def test_evaluation_does_not_depend_on_the_batch():
  _, _, found = random_case()
  head = heads.SegmentationHead(8, 5, layers.Compute())
  features = RNG.normal(size=(6, 9, 4)).astype(np.float32)
  params = head.init(jax.random.key(0), features)["params"]
  results = [
    segmentation.evaluate(
      head, params, features, found, background=0, batch=size
    )
    for size in (6, 4)
  ]
  for a, b in zip(*results):
    np.testing.assert_array_equal(a, b)
