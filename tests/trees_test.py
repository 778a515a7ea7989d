"""Paths, patterns, and what errors say."""

import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.errors import InputError


def _tree():
  return {
    "llm": {"head": {"kernel": np.ones((2, 3), np.float32)}},
    "vision": {
      "fc": {"kernel": np.zeros((3, 3)), "bias": np.full(3, 2.0)},
    },
  }


def test_flatten_and_unflatten_are_inverse_in_sorted_order():
  flat = trees.flatten(_tree())
  assert list(flat) == ["llm/head/kernel", "vision/fc/bias", "vision/fc/kernel"]
  assert trees.flatten(trees.unflatten(flat)).keys() == flat.keys()
  assert trees.flatten({}) == {} and trees.unflatten({}) == {}


def test_split_then_merge_is_the_same_tree():
  inside, outside = trees.split(_tree(), (r"vision/.*/bias", r"llm/.*"))
  assert list(trees.flatten(inside)) == ["llm/head/kernel", "vision/fc/bias"]
  assert list(trees.flatten(outside)) == ["vision/fc/kernel"]
  assert trees.fingerprint(trees.merge(inside, outside)) == trees.fingerprint(
    _tree()
  )


def test_a_pattern_must_match_the_whole_path():
  with pytest.raises(InputError, match="'vision/fc' matches no parameter"):
    trees.split(_tree(), ("vision/fc",))


def test_a_misspelt_pattern_is_answered_with_the_nearest_path():
  with pytest.raises(InputError, match="did you mean 'llm/head/kernel'"):
    trees.split(_tree(), ("llm/heed/kernel",))


def test_merging_trees_that_overlap_is_refused():
  with pytest.raises(ValueError, match="llm/head/kernel"):
    trees.merge(_tree(), {"llm": _tree()["llm"]})


def test_the_first_rule_that_matches_wins():
  rules = ((r".*/bias", 1), (r"vision/.*", 2), (r".*", 3))
  assert trees.match(rules, _tree()) == {
    "llm/head/kernel": 3,
    "vision/fc/bias": 1,
    "vision/fc/kernel": 2,
  }


def test_a_path_without_a_rule_and_a_rule_without_a_path_are_refused():
  with pytest.raises(InputError, match="no rule covers.*llm/head/kernel"):
    trees.match(((r"vision/.*", 1),), _tree())
  with pytest.raises(InputError, match="'audio/.*' matches no parameter"):
    trees.match(((r".*", 1), (r"audio/.*", 2)), _tree())


def test_a_subtree_is_found_or_the_way_to_it_is_named():
  assert set(trees.subtree(_tree(), "vision/fc")) == {"kernel", "bias"}
  assert set(trees.subtree(_tree(), "")) == {"llm", "vision"}
  with pytest.raises(InputError, match="'fd' there is fc"):
    trees.subtree(_tree(), "vision/fd")
  with pytest.raises(InputError, match="a leaf"):
    trees.subtree(_tree(), "vision/fc/bias/x")


def test_diff_names_missing_extra_and_misshapen_leaves():
  actual = _tree()
  del actual["vision"]["fc"]["bias"]
  actual["llm"]["head"]["kernel"] = np.ones((3, 2))
  actual["llm"]["new"] = np.ones(1)
  assert trees.diff(_tree(), actual) == [
    "missing vision/fc/bias (3,)",
    "extra llm/new (1,)",
    "shape of llm/head/kernel is (3, 2), not (2, 3)",
  ]
  assert trees.diff(_tree(), _tree()) == []


@pytest.mark.parametrize(
  "other",
  [
    np.ones((2, 3), np.float16),
    np.ones((3, 2), np.float32),
    np.nextafter(np.ones((2, 3), np.float32), 2),
  ],
)
def test_a_crc_depends_on_dtype_shape_and_every_bit(other):
  leaf = np.ones((2, 3), np.float32)
  assert trees.leaf_crc(leaf) == trees.leaf_crc(leaf.copy())
  assert trees.leaf_crc(leaf) != trees.leaf_crc(other)


def test_a_crc_does_not_depend_on_memory_order_and_takes_scalars():
  leaf = np.arange(6.0).reshape(2, 3)
  assert trees.leaf_crc(leaf) == trees.leaf_crc(np.asfortranarray(leaf))
  assert len(trees.leaf_crc(np.float32(1))) == 8


def test_a_digest_does_not_depend_on_the_order_of_keys():
  assert trees.digest({"a": "1", "b": "2"}) == trees.digest(
    {"b": "2", "a": "1"}
  )
  assert trees.digest({"a": "1"}) != trees.digest({"a": "2"})


def test_count_counts_scalars():
  assert trees.count(_tree()) == 6 + 9 + 3


def test_relative_change_is_euclidean_over_all_leaves():
  before = {"a": np.array([3.0]), "b": np.array([4.0])}
  after = {"a": np.array([3.0]), "b": np.array([4.5])}
  assert trees.relative_change(before, after) == pytest.approx(0.1)
  with pytest.raises(ValueError, match="differ"):
    trees.relative_change(before, {"a": before["a"]})


def test_a_change_is_measured_leaf_by_leaf_to_the_last_bit(monkeypatch):
  rng = np.random.default_rng(0)
  for shape in ((3, 1001, 37), (129,), (), (2**16, 3)):
    old = rng.normal(size=shape).astype(np.float32)
    new = np.float32(old + rng.normal(size=shape))
    change = np.sum((np.float64(new) - np.float64(old)) ** 2)
    wanted = float(np.sqrt(change / np.sum(np.float64(old) ** 2)))
    # numpy halves down to 128 numbers.
    for block in (128, 1000, 2**22):
      monkeypatch.setattr(trees, "_BLOCK", block)
      assert trees.relative_change({"a": old}, {"a": new}) == wanted


def test_a_change_says_of_each_part_how_far_and_whether_it_moved():
  before = {"a": {"x": np.ones(2), "y": np.ones(2)}, "b": {"z": np.ones(3)}}
  after = {"a": {"x": np.ones(2), "y": np.zeros(2)}, "b": {"z": np.ones(3)}}
  change = trees.Change(before)
  for path, leaf in trees.flatten(after).items():
    change.add(path, leaf)
  assert change.moved == {"a"}
  for part in ("a", "b"):
    wanted = trees.relative_change(before[part], after[part])
    assert change.of(part) == wanted
