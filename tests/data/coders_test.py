"""A stage codes rows by its section of a config."""

import pytest

from pivot_jax.configs import common
from pivot_jax.data import coders
from tests.fixtures import tiny_stages


@pytest.mark.parametrize(
  "kind, fields, pairs, mask",
  [
    ("train", {}, True, "paper"),
    ("train", dict(mask="answer"), False, "answer"),
    ("score", {}, True, "paper"),
    ("gradcam", {}, True, "paper"),
    ("evaluate", {}, True, "answer"),
  ],
)
def test_a_section_decides_how_its_stage_codes_rows(kind, fields, pairs, mask):
  section = common.stage(kind, max_length=7, **fields).to_dict()
  coder = coders.coder_of(
    section | {"resample": "bilinear"},
    tiny_stages.TOKENIZER,
    image_size=48,
    patches=36,
    long="drop",
    pairs=pairs,
  )
  assert (coder.pairs, coder.mask, coder.template) == (pairs, mask, "qwen_1_5")
  assert (coder.image_size, coder.patches) == (48, 36)
  assert (coder.resample, coder.max_length) == ("bilinear", 7)
  assert coder.long == "drop"
