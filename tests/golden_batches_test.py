"""Whole numbers that no reorganisation may change; see `golden_batches`."""

import pytest

from tests import golden_batches

PINS = golden_batches.read()


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
  """Return every reading, its small files written."""
  folder = tmp_path_factory.mktemp("files")
  return golden_batches.scenes() | golden_batches.files(folder)


@pytest.mark.parametrize(
  "name", [*golden_batches.scenes(), *golden_batches.FILES]
)
def test_a_source_is_packed_into_the_batches_it_was(readings, name):
  found = golden_batches.batches(readings[name])
  assert len(found) == golden_batches.UPDATES
  assert found == PINS["batches"][name]


def test_every_reading_is_pinned(readings):
  assert set(readings) == set(PINS["batches"])


def test_other_scenes_are_other_batches(readings):
  chat = readings["scenes chat"]
  other = golden_batches.Reading(dict(chat.spec, seed=1))
  assert not {*golden_batches.batches(other)} & {
    *PINS["batches"]["scenes chat"]
  }


def test_a_mixed_stream_has_the_order_it_had():
  assert golden_batches.order() == PINS["order"]


def test_the_toy_tokenizer_gives_the_ids_it_gave():
  found = golden_batches.tokens(golden_batches.toy())
  assert found == PINS["tokens toy"]


def test_the_qwen2_tokenizer_gives_the_ids_it_gave(test_data):
  found = golden_batches.tokens(test_data / golden_batches.QWEN)
  assert found == PINS["tokens qwen2"]


def test_shipped_weights_are_exported_to_the_bytes_they_were(tmp_path):
  assert golden_batches.exports(tmp_path) == PINS["exports"]
