"""A recipe of one stage of each kind, on a model of under 50,000 parameters.

tests/processes/micro.py           every kind
tests/processes/micro.py:train     a training alone
"""

import dataclasses

from pivot_jax.configs import common, pivot
from tests.fixtures import tiny

STEPS = 8
_KINDS = (*("detach", "linear_probe", "segment_probe", "gradcam", "evaluate"),)


def get_config(name: str = "") -> common.ConfigDict:
  """Return the recipe."""
  c = pivot.get_config("debug")
  arm = pivot.ARMS[-1]
  c.vision = dataclasses.asdict(tiny.VISION) | dict(init="", image_size=24)
  c.llm = dataclasses.asdict(tiny.LLM) | dict(init="", vocab_size=0)
  # A model that starts at random.
  c.stage1_full.inputs, c.stage1_full.shipped = {}, ""
  c.stage1_full.data = (("chat", 1.0),)
  for one in ("stage1_full", "stage2_sft", "stage2_dpo"):
    c[one].update(dict(batch=8, steps=STEPS, save_every=2))
    c[one].pack = dict(tokens=0, losses=0, images=1, row=0, row_images=0)
  c.segment_probe_dpo.update(dict(epochs=2, hidden=16, warmup=2, batch=8))
  c.gradcam_dpo.update(dict(batch=4, examples=2))
  c.evaluate_dpo.update(dict(batch=6, blind="", max_new_tokens=12))
  c.linear_probe_dpo.update(dict(batch=8, lambdas=(1e-2, 1e2, 3)))
  c.reference.batch = 6
  for source, size in dict(
    chat=64, preference=20, eval=13, classify_train=37, classify_test=21,
    segment_train=19, segment_test=11, gradcam=13,
  ).items():  # fmt: skip
    c.sources[source].size = size
  c.arms, c.compared = (arm,), ()
  made = ("stage1_full", "reference", "stage2_sft", "stage2_dpo")
  c.order = (*made, *(f"{kind}_dpo" for kind in _KINDS), "report")
  if name == "train":
    c.order = ("stage1_full",)
  return c
