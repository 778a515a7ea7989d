"""Mistakes in files as a user sees them: one line, exit code 2, no traceback.

What each reader refuses is tested beside the reader; here a whole run meets
the mistake, by the command's own entry.
"""

import json
import types

import numpy as np
import pytest
import safetensors.numpy
import transformers
from PIL import Image

from pivot_jax import main, output
from pivot_jax.configs import pivot
from pivot_jax.training import loop
from tests.fixtures import tiny_stages

TURNS = [
  {"from": "human", "value": "<image>\nhow many objects are there ?"},
  {"from": "gpt", "value": "two"},
]
PAIR = {"question": "which digit is shown ?", "chosen": "3", "rejected": "4"}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
  """Return fn(config) -> (exit code, lines on stderr) of the command.

  Flags are main_test's business: the config stands where they would put it.
  """

  def run(config):
    flags = {
      "_CONFIG": config, "_WORKDIR": str(tmp_path / "run"), "_DRY_RUN": False, "_RERUN": []
    }  # fmt: skip
    for name, value in flags.items():
      monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    # What is global to the process belongs to the other tests, too.
    monkeypatch.setattr(main, "_join", lambda config: None)
    monkeypatch.setattr(output, "log", lambda: None)
    monkeypatch.setattr(loop, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(main, "_overrides", dict)
    with pytest.raises(SystemExit) as left:
      main.main([])
    return left.value.code, capsys.readouterr().err.splitlines()

  return run


def refused(command, config, *parts):
  """Assert that the command leaves with one line that holds all the parts."""
  code, lines = command(config)
  assert code == main.EXIT_INPUT
  assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
  missing = [part for part in parts if part not in lines[-1]]
  assert not missing, lines[-1]


@pytest.fixture
def picture(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  path = tmp_path / "images" / "good.png"
  path.parent.mkdir()
  Image.fromarray(noise).save(path)
  return path


def recipe(tmp_path, stage, **files):
  """Return the recipe on given files, cut down to one stage of two updates."""
  config = pivot.get_config("files")
  config.order = (stage,)
  config.files.update(files | {"images": str(tmp_path / "images")})
  if config[stage].kind == "train":
    config[stage].update(dict(steps=2, batch=1))
  return config


def conversations(tmp_path, stage, *records):
  path = tmp_path / "pretrain.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
  return recipe(tmp_path, stage, pretrain=str(path))


def talk(**fields):
  return dict(image="good.png", conversations=TURNS) | fields


def damaged(picture, name):
  """Write an image whose second half is lost."""
  path = picture.with_name(name)
  Image.open(picture).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("change, parts", [
  (dict(image="gone.png"), ("gone.png: no such file",)),
  (dict(image="cut.jpg"), ("images/cut.jpg: cannot decode the image",)),
  (dict(image="cut.png"), ("images/cut.png: cannot decode the image",)),
  (dict(image="../good.png"), (
    "'../good.png' escapes the image root; use a relative path",
  )),
  (dict(conversations=TURNS[:1]), ("no answer; add a turn from gpt",)),
], ids=str)  # fmt: skip
def test_a_conversation_that_cannot_be_used_is_named_by_file_and_line(
  command, tmp_path, picture, change, parts
):
  for name in ("cut.jpg", "cut.png"):
    damaged(picture, name)
  config = conversations(tmp_path, "stage1_proj", talk(), talk(**change))
  refused(command, config, f"{tmp_path}/pretrain.jsonl:2: ", *parts)


def test_a_row_that_its_image_makes_too_long_is_named_with_the_limit(
  command, tmp_path, picture
):
  config = conversations(tmp_path, "stage1_proj", talk(id="long"))
  # 29 tokens of text and 36 patches: together over the limit, alone not.
  config.stage1_proj.max_length = 50
  refused(
    command,
    config,
    "row long: 65 tokens (59 of prompt and image) are over max_length=50",
    "shorten the row or raise max_length",
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Return the address of a whole model, which a score stage needs."""
  return tiny_stages.save(
    tmp_path_factory.mktemp("whole"), tiny_stages.params()
  )


def pairs(tmp_path, init, text):
  path = tmp_path / "preference.jsonl"
  path.write_bytes(text)
  config = recipe(tmp_path, "reference", preference=str(path))
  config.reference.inputs.init = init
  return config


def line(**fields):
  row = dict(image="good.png") | PAIR | fields
  return json.dumps(row, ensure_ascii=False).encode("latin-1") + b"\n"


def test_a_pair_of_equal_answers_is_named_by_file_and_line(
  command, tmp_path, picture, whole
):
  config = pairs(tmp_path, whole, line() + line(rejected="3"))
  refused(
    command,
    config,
    f"{tmp_path}/preference.jsonl:2: chosen and rejected are equal",
    "remove the pair",
  )


def test_a_line_that_is_not_utf_8_is_named_with_its_byte(
  command, tmp_path, picture, whole
):
  bad = line(question="caf\xe9 ?")
  at = bad.index(b"\xe9") + 1
  refused(
    command,
    pairs(tmp_path, whole, line() + bad),
    f"{tmp_path}/preference.jsonl:2: invalid UTF-8 at byte {at} of the line",
  )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """Return the tensors and the folder of a tiny encoder of transformers."""
  folder = tmp_path_factory.mktemp("encoder")
  config = transformers.SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
  )
  transformers.SiglipVisionModel(config).save_pretrained(folder)
  return safetensors.numpy.load_file(folder / "model.safetensors"), folder


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_weights_that_do_not_fit_their_config_are_named_by_tensor(
  command, tmp_path, picture, encoder, what
):
  tensors, source = encoder
  (path,) = (name for name in tensors if name.endswith("layers.0.mlp.fc1.bias"))
  changed = dict(tensors)
  if what == "missing":
    del changed[path]
  else:
    path = path.replace("fc1", "fc9")
    changed[path] = np.zeros(24, np.float32)
  folder = tmp_path / "weights"
  folder.mkdir()
  (folder / "config.json").write_text((source / "config.json").read_text())
  safetensors.numpy.save_file(changed, folder / "model.safetensors")
  config = conversations(tmp_path, "stage1_proj", talk())
  config.vision.init = f"hf:{folder}"
  refused(
    command,
    config,
    f"{folder}: the tensors do not fit the model; {what}: ",
    "layers.0.mlp.fc1.bias (24,);"
    if what == "missing"
    else "layers.0.mlp.fc9.bias (24,);",
    "give weights and config.json of the same model, complete",
  )
