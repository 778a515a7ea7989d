"""The encoder that the detach stage cuts out, opened by transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from pivot_jax.models import mllm
from pivot_jax.stages import detach
from pivot_jax.weights import artifacts, checkpoint
from tests.fixtures import tiny_models
from tests.parity import foreign
from tests.weights.convert import folders


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """Return (folders, images, torch's hidden states, our features)."""
  torch.manual_seed(0)
  theirs = transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(**foreign.VISION)
  )
  foreign.roughen(theirs, 1)
  places = [tmp_path_factory.mktemp(n) for n in ("theirs", "whole", "cut")]
  theirs.save_pretrained(places[0])
  configs, encoder, _ = folders.load(places[0])
  model = mllm.MLLM(tiny_models.LLM, configs["vision"])
  params = mllm.init_params(model, jax.random.key(0)) | encoder
  meta = {
    "vision": dataclasses.asdict(model.vision),
    "llm": dataclasses.asdict(model.llm),
    "sources": {},
    "not_carried": [],
  }
  artifacts.save(places[1], params, meta=meta)
  detach.run(None, {"init": str(places[1])}, places[2])
  images = foreign.images(3)
  expected = hidden_states(theirs, images)
  return places, images, expected, features(model, params, images)


def features(model, params, images):
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
  return np.asarray(run(params, images))


def hidden_states(model, images):
  with torch.no_grad():
    found = model(foreign.pixels(images), output_hidden_states=True)
  return [states.numpy() for states in found.hidden_states]


def opened(folder):
  return foreign.loaded_without_loss(transformers.SiglipVisionModel, folder)


def test_the_penultimate_hidden_state_is_the_feature_of_the_whole_model(case):
  (_, _, out), images, expected, ours = case
  states = hidden_states(opened(out / "hf"), images)
  assert 0.5 < np.abs(ours).max() < 20
  assert foreign.difference(states[-2], ours) < foreign.TOLERANCE
  # What torch computed before we had read the encoder: the same operations.
  np.testing.assert_array_equal(states[-2], expected[-2])
  # A layer earlier would be noticed.
  assert foreign.difference(states[-3], ours) > foreign.MISS


def test_our_artifact_and_the_portable_folder_are_one_encoder(case):
  (_, _, out), images, _, ours = case
  for address in (str(out), f"hf:{out / 'hf'}"):
    found = checkpoint.load(address)
    params = {"vision": found.params["vision"]}
    got = features(mllm.MLLM(None, found.vision), params, images)
    np.testing.assert_array_equal(got, ours)


def test_a_hugging_face_encoder_leaves_with_the_block_nobody_reads(
  case, tmp_path
):
  (theirs, _, _), images, expected, _ = case
  detach.run(None, {"init": f"hf:{theirs}"}, tmp_path)
  states = hidden_states(opened(tmp_path / "hf"), images)
  for found, wanted in zip(states, expected, strict=True):
    np.testing.assert_array_equal(found, wanted)
  assert foreign.difference(states[-1], states[-2]) > foreign.MISS
