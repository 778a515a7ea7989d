"""Our exports as transformers 4.57 reads them; run by hand, in two steps.

  python -m tests.parity.transformers_4_57 write DIR
  python3 -m venv v
  v/bin/pip install transformers==4.57.6 torch==2.13.0 pillow jinja2
  v/bin/python tests/parity/transformers_4_57.py read DIR

The first step makes tiny random models with the transformers of the tests,
exports them, and writes beside each folder what we compute. The second knows
neither this project nor jax; it runs under transformers 5, too. What both
printed stands in transformers_4_57.txt. `export_test.py` and `tokenizer_test.py`
use the models and the texts.

With PIVOT_JAX_TEST_DATA set, the tokenizer of Qwen2 is written, too.
"""

import datetime
import json
import os
import pathlib
import re
import sys

import numpy as np
import torch
import transformers
from PIL import Image

QUESTION = "What is it?"
ENCODERS = ("siglip", "clip", "dinov2", "dinov2_gated", "vit", "vit_mae")
NEW_TOKENS = 32
SIZES = dict(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=28,
  patch_size=8,
)


def encoder(name):
  """A tiny random encoder, as its class in transformers 5."""
  kind, more = {
    "siglip": ("SiglipVision", {}),
    "clip": ("CLIPVision", {}),
    "dinov2": ("Dinov2", dict(mlp_ratio=2)),
    "dinov2_gated": ("Dinov2", dict(mlp_ratio=2, use_swiglu_ffn=True)),
    "vit": ("ViT", {}),
    "vit_mae": ("ViTMAE", dict(mask_ratio=0.0)),
  }[name]
  config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
  return getattr(transformers, f"{kind}Model")(config)


def multimodal(tower, *, tied, **text_sizes):
  """A tiny random Llava of a SigLIP or CLIP tower and a Qwen2."""
  kinds = {
    "siglip": (transformers.SiglipVisionConfig, "full"),
    "clip": (transformers.CLIPVisionConfig, "default"),
  }
  kind, strategy = kinds[tower]
  sizes = dict(
    vocab_size=512,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
  )
  text = transformers.Qwen2Config(
    **sizes | text_sizes,
    max_position_embeddings=256,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
    tie_word_embeddings=tied,
  )
  config = transformers.LlavaConfig(
    vision_config=kind(**SIZES),
    text_config=text,
    # An entry of the table that no prompt here has.
    image_token_index=text.vocab_size - 1,
    vision_feature_layer=-2,
    vision_feature_select_strategy=strategy,
    tie_word_embeddings=tied,
  )
  return transformers.LlavaForConditionalGeneration(config)


def language_model(vocab_size):
  """A tiny random Qwen2."""
  config = transformers.Qwen2Config(
    vocab_size=vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  )
  return transformers.Qwen2ForCausalLM(config)


def texts():
  """Texts that tokenizers split in different ways; without Unicode in a file."""
  path = pathlib.Path(__file__).parents[1] / "golden" / "tokenizer_texts.json"
  groups = json.loads(path.read_text("ascii"))
  return [text for group in groups.values() for text in group]


def tokenized(tokenizer, image_id=None):
  """The tokens of each text by our tokenizer, expected of a folder's.

  `ids` with special tokens acting, `<image>` among them if it has an id; `plain`
  with every text as text.
  """
  split = "(<image>)" if image_id is not None else "$^"
  ids = []
  for text in texts():
    found = []
    for piece in re.split(split, text):
      image = piece == "<image>" and image_id is not None
      found += [image_id] if image else tokenizer.encode(piece, True)
    ids.append(found)
  plain = [tokenizer.encode(text) for text in texts()]
  return {"texts": texts(), "ids": ids, "plain": plain}


def same_tokens(folder, expected, **choices):
  """Count the texts that AutoTokenizer encodes as expected, both ways, and decodes."""
  found = transformers.AutoTokenizer.from_pretrained(folder, **choices)
  same = 0
  for text, ids, plain in zip(*expected.values(), strict=True):
    as_text = found(text, split_special_tokens=True)["input_ids"]
    # Bytes of text that Qwen2 normalizes come back normalized.
    decoded = found.encode(found.decode(ids))
    same += (found.encode(text), as_text, decoded) == (ids, plain, ids)
  return same


def picture(seed=0, size=(40, 31)):
  """A picture of another size and shape than the encoders read."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
  return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def features(model, pixel_values):
  """The features of an encoder, from transformers' outputs."""
  kind = model.config.model_type
  inputs = dict(pixel_values=pixel_values, output_hidden_states=True)
  if kind == "vit_mae":
    # Without noise it shuffles the patches even if none is masked.
    count = (model.config.image_size // model.config.patch_size) ** 2
    inputs["noise"] = torch.arange(count)[None].repeat(len(pixel_values), 1)
  with torch.no_grad():
    found = model(**inputs)
  if kind == "siglip_vision_model":
    return found.hidden_states[-2].numpy()
  states = found.hidden_states if kind == "clip_vision_model" else None
  return (states[-2] if states else found.last_hidden_state)[:, 1:].numpy()


def change_what_is_not_read(model):
  """Put other numbers into the last block, the last norm and the head."""
  last = model.config.vision_config.num_hidden_layers - 1
  parts = (f"encoder.layers.{last}.", "post_layernorm", "vision_model.head.")
  parts = (*parts, "vision_tower.head.")
  changed = 0
  with torch.no_grad():
    for name, x in model.named_parameters():
      if "vision_tower" in name and any(part in name for part in parts):
        x.add_(0.5)
        changed += 1
  return changed


def write(folder):
  """Make and export the models; write what we compute of them."""
  # Not for the second step, which has none of them.
  from pivot_jax import addresses
  from pivot_jax.data.tokenizer import load_tokenizer
  from tests.parity import foreign

  toy = addresses.tokenizer_folder("package:toy")
  _export_languages("toy", load_tokenizer(toy), folder)
  if "PIVOT_JAX_TEST_DATA" in os.environ:
    data = pathlib.Path(os.environ["PIVOT_JAX_TEST_DATA"])
    qwen = load_tokenizer(data / "tokenizer_qwen2")
    _export_languages("qwen2", qwen, folder)
  for name in ENCODERS:
    torch.manual_seed(0)
    source = folder / "sources" / name
    foreign.roughen(encoder(name), 1).save_pretrained(source)
    _export_encoder(name, source, folder)
  for tower in ("siglip", "clip"):
    for tied in (True, False):
      torch.manual_seed(0)
      name = f"llava_{tower}_{'tied' if tied else 'untied'}"
      source = folder / "sources" / name
      foreign.roughen(multimodal(tower, tied=tied), 3).save_pretrained(source)
      load_tokenizer(toy).save(source)
      _export_multimodal(name, source, folder)


def _export_languages(name, tokenizer, folder):
  """Export a language model and a Llava with a tokenizer, to look at that."""
  size = -(-tokenizer.vocab_size // 512) * 512
  llava = multimodal(
    "siglip",
    tied=True,
    vocab_size=size,
    hidden_size=16,
    num_attention_heads=2,
  )
  for form, model in (("hf", language_model(size)), ("llava", llava)):
    out = folder / f"tokenizer_{name}_{form}"
    expected = export_tokenizer(
      model, tokenizer, folder / "sources" / out.name, out, form
    )
    path = folder / f"{out.name}.tokens.json"
    path.write_text(json.dumps(expected), "ascii")


def export_tokenizer(model, tokenizer, source, out, form):
  """Export a model of transformers with a tokenizer; return its tokens."""
  from pivot_jax.weights import export
  from pivot_jax.weights.convert import llava

  model.save_pretrained(source)
  tokenizer.save(source)
  export.export(f"hf:{source}", out, format=form)
  if form == "hf":
    return tokenized(tokenizer)
  return tokenized(tokenizer, llava.with_image_token(tokenizer)[1])


def _export_encoder(name, source, folder):
  import pivot_jax

  model, params = pivot_jax.load(f"hf:{source}")
  pixels = model.preprocess([picture()])
  pivot_jax.save(folder / name, model, params, format="hf")
  np.savez(
    folder / f"{name}.npz",
    picture=np.asarray(picture()),
    features=np.asarray(model.apply({"params": params}, pixels)),
  )


def _export_multimodal(name, source, folder):
  import pivot_jax
  from pivot_jax.data import chat
  from pivot_jax.weights import export

  model, params = pivot_jax.load(f"hf:{source}")
  artifact = folder / "sources" / f"{name}_artifact"
  pivot_jax.save(artifact, model, params)
  export.export(str(artifact), folder / name, format="llava")
  prompt = expanded(chat.encode_prompt(model.tokenizer, QUESTION).prompt, model)
  pixels = model.preprocess([picture()])
  np.savez(
    folder / f"{name}.npz",
    picture=np.asarray(picture()),
    prompt=prompt,
    logits=np.asarray(model.apply({"params": params}, prompt[None], pixels))[0],
    answer=answer(model, params, prompt, pixels),
  )


def expanded(prompt, model):
  """A prompt with an image's patches, each -200, where it has one -200."""
  at = int(np.flatnonzero(prompt == -200)[0])
  patches = np.full(model.vision.num_patches, -200, np.int32)
  return np.concatenate([prompt[:at], patches, prompt[at + 1 :]])


def answer(model, params, prompt, pixels, count=NEW_TOKENS):
  """The greedy answer, by our own cache."""
  from tests.fixtures import tiny_models

  ones = np.ones((1, len(prompt)), np.int32)
  is_image = prompt[None] == -200
  batch = tiny_models.Batch(
    tokens=np.where(is_image, 0, prompt),
    positions=np.arange(len(prompt), dtype=np.int32)[None],
    segments=ones,
    branches=0 * ones,
    image_index=np.where(is_image, is_image.cumsum(1) - 1, -1),
    images=pixels[:, None],
  )
  return tiny_models.generated(
    model.mllm,
    params,
    batch,
    max_new_tokens=count,
    eos_ids=model.tokenizer.eos_ids,
  )[0]


def read(folder):
  """Load every folder and print a line about it."""
  today = datetime.date.today().isoformat()
  _say(
    f"transformers {transformers.__version__}, torch {torch.__version__},"
    f" {today}"
  )
  failed = False
  for path in sorted(folder.glob("*.npz")):
    with np.load(path) as expected:
      look = _look_at_llava if "logits" in expected else _look_at_encoder
      facts, sound = look(path.with_suffix(""), expected)
    failed |= not sound
    _say(f"{path.stem}: {'; '.join(facts)}{'' if sound else '  <-- WRONG'}")
  for path in sorted(folder.glob("*.tokens.json")):
    expected = json.loads(path.read_text("ascii"))
    name = path.name.removesuffix(".tokens.json")
    same, count = same_tokens(folder / name, expected), len(expected["texts"])
    failed |= same < count
    wrong = "" if same == count else "  <-- WRONG"
    _say(f"{name}: {same} of {count} texts have the same tokens{wrong}")
  return 1 if failed else 0


def _look_at_encoder(folder, expected):
  name = json.loads((folder / "config.json").read_text())["architectures"][0]
  model, facts, whole = _load(getattr(transformers, name), folder)
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  image = Image.fromarray(expected["picture"])
  pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
  miss = np.abs(features(model, pixels) - expected["features"]).max()
  return [name, *facts, f"features differ by {miss:.1e}"], whole and miss < 1e-5


def _look_at_llava(folder, expected):
  kind = transformers.LlavaForConditionalGeneration
  model, facts, whole = _load(kind, folder)
  processor = transformers.AutoProcessor.from_pretrained(folder)
  inputs = processor(
    text=prompt_text(processor),
    images=[Image.fromarray(expected["picture"])],
    return_tensors="pt",
  )
  ids = inputs["input_ids"][0].numpy()
  image_id = model.config.image_token_index
  prompt = np.where(expected["prompt"] < 0, image_id, expected["prompt"])
  same = np.array_equal(ids, prompt)
  logits = _logits(model, inputs)
  known = expected["logits"].shape[1]
  miss = np.abs(logits[:, :known] - expected["logits"]).max()
  found = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, len(ids) :]
  count = int((found.numpy() == expected["answer"][: len(found)]).sum())
  changed = change_what_is_not_read(model)
  moved = np.abs(_logits(model, inputs) - logits).max()
  facts += [
    f"prompt of {len(ids)} ids {'equal' if same else 'DIFFERENT'}",
    f"logits differ by {miss:.1e}",
    f"{count} of {NEW_TOKENS} greedy tokens equal",
    f"by {changed} changed tensors behind the features logits move by {moved}",
  ]
  good = same and miss < 1e-5 and count == NEW_TOKENS and changed and not moved
  return facts, whole and bool(good)


def prompt_text(processor):
  """The question as a chat, by the template of the folder."""
  content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
  return processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
  )


def _load(kind, folder):
  model, report = kind.from_pretrained(folder, output_loading_info=True)
  counts = {k: len(report[k]) for k in ("missing_keys", "unexpected_keys")}
  facts = [
    f"{count} {name.removesuffix('_keys')}" for name, count in counts.items()
  ]
  return model.eval().float(), facts, not any(report.values())


def _logits(model, inputs):
  with torch.no_grad():
    return model(**inputs).logits[0].numpy()


def _say(text):
  sys.stdout.write(text + "\n")


if __name__ == "__main__":
  transformers.logging.set_verbosity_error()
  if len(sys.argv) != 3 or sys.argv[1] not in ("write", "read"):
    sys.exit(__doc__)
  run = write if sys.argv[1] == "write" else read
  sys.exit(run(pathlib.Path(sys.argv[2])))
