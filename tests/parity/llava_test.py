"""The whole model against transformers' LlavaForConditionalGeneration."""

import jax
import numpy as np
import pytest
import torch
import transformers

from pivot_jax.models import layers, mllm
from pivot_jax.weights.convert import hf
from tests.fixtures import tiny_models
from tests.parity import foreign
from tests.weights.convert import folders

IMAGE = 60  # the vocabulary entry that stands for a patch
PATCHES = 9
LENGTHS = (17, 13)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  torch.manual_seed(0)
  config = transformers.LlavaConfig(
    vision_config=transformers.SiglipVisionConfig(
      **foreign.VISION, vision_use_head=False
    ),
    text_config=transformers.Qwen2Config(
      **foreign.LLM, tie_word_embeddings=True
    ),
    image_token_index=IMAGE,
    vision_feature_layer=-2,
    vision_feature_select_strategy="full",
    tie_word_embeddings=True,
  )
  model = foreign.roughen(transformers.LlavaForConditionalGeneration(config), 3)
  folder = tmp_path_factory.mktemp("llava")
  model.save_pretrained(folder)
  batch = tiny_models.prompts(LENGTHS, width=17, patches=PATCHES, vocab=IMAGE)
  return folder, batch, _run_torch(model, batch)


def _inputs(batch, row=None):
  chosen = slice(None) if row is None else slice(row, row + 1)
  ids = np.where(batch.image_index >= 0, IMAGE, batch.tokens)[chosen]
  mask = np.asarray(batch.segments)[chosen]
  if row is not None:
    ids, mask = ids[:, : LENGTHS[row]], mask[:, : LENGTHS[row]]
  return dict(
    input_ids=torch.tensor(ids).long(),
    attention_mask=torch.tensor(mask),
    pixel_values=foreign.pixels(batch.images[chosen, 0]),
  )


def _run_torch(model, batch):
  with torch.no_grad():
    return model(**_inputs(batch)).logits.numpy()


def _run_ours(folder, batch):
  configs, params, _ = folders.load(folder)
  model = mllm.MLLM(configs["llm"], configs["vision"])
  hidden = jax.jit(lambda p, b: model.apply({"params": p}, b))(params, batch)
  return np.asarray(hidden @ model.apply({"params": params}, method="head"))


def _miss(batch, a, b):
  valid = np.asarray(batch.segments) > 0
  return foreign.difference(a[valid], b[valid])


def test_logits_agree_with_an_image_in_the_prompt(case):
  folder, batch, expected = case
  got = _run_ours(folder, batch)
  assert 0.5 < np.abs(expected).max() < 20
  assert _miss(batch, got, expected) < foreign.TOLERANCE


def test_the_wrong_projector_activation_misses_by_ten_tolerances(
  case, monkeypatch
):
  folder, batch, expected = case
  monkeypatch.setattr(layers, "gelu_erf", layers.gelu_tanh)
  assert _miss(batch, _run_ours(folder, batch), expected) > foreign.MISS


def test_exchanged_images_miss_by_ten_tolerances(case):
  folder, batch, expected = case
  swapped = batch._replace(images=batch.images[::-1])
  assert _miss(batch, _run_ours(folder, swapped), expected) > foreign.MISS


def test_greedy_answers_agree(case):
  folder, batch, _ = case
  theirs = foreign.loaded_without_loss(
    transformers.LlavaForConditionalGeneration, folder
  )
  expected = []
  for row, length in enumerate(LENGTHS):
    answer = theirs.generate(
      **_inputs(batch, row),
      max_new_tokens=8,
      min_new_tokens=8,
      do_sample=False,
      pad_token_id=0,
    )
    expected.append(answer[0, length:].numpy())
  configs, params, _ = folders.load(folder)
  got = tiny_models.generated(
    mllm.MLLM(configs["llm"], configs["vision"]),
    params,
    batch,
    max_new_tokens=8,
    eos_ids=(IMAGE,),
  )
  np.testing.assert_array_equal(got, expected)


def test_transformers_loads_our_export_without_loss(case, tmp_path):
  folder, batch, expected = case
  configs, params, info = folders.load(folder)
  assert len(info["not_carried"]) == 16 + 2  # last block and post_layernorm
  hf.save_llava(
    tmp_path,
    configs["vision"],
    configs["llm"],
    params,
    image_token_id=IMAGE,
    unread=hf.open_folder(folder).read_unread(),
  )
  model = foreign.loaded_without_loss(
    transformers.LlavaForConditionalGeneration, tmp_path
  )
  np.testing.assert_array_equal(_run_torch(model, batch), expected)
