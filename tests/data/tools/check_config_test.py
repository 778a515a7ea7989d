import json
import pathlib

import ml_collections
import pytest
from PIL import Image

from pivot_jax.data.tools import check, check_config
from pivot_jax.errors import InputError
from pivot_jax.models import vit
from pivot_jax.recipe.inputs import Step

ROOT = pathlib.Path(__file__).parents[3]
TALK = [
  {"from": "human", "value": "<image>\nhow many"},
  {"from": "gpt", "value": "one"},
]
ROW = {"id": "a", "image": "a.png", "conversations": TALK}
PAIR = {
  "id": "p",
  "image": "a.png",
  "question": "<image>\nhow many",
  "chosen": "one",
  "rejected": "two",
}
CONFIG = """
import functools

from pivot_jax.configs import common

def get_config(name=""):
  c = common.ConfigDict()
  c.seeds, c.shared, c.order = 1, (), ("train", "later")
  c.tensorboard, c.profile = False, ""
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.compute = dict(dtype="float32", remat="none", scan=False, attention="auto")
  c.tokenizer, c.resample = "package:toy", "bicubic"
  c.vision = dict(init="package:toy:vision", image_size=48, patch_size=8)
  c.llm = dict(init="package:toy:llm")
  given = dict(path="rows.jsonl", image_root="images")
  c.sources = dict(
    chat=dict(kind="llava", max_bad=0.0, **given),
    text=dict(kind="llava_text", path="rows.jsonl"),
    again=dict(kind="llava", given_by="nobody", **given),
    none=dict(kind="eval", path="", given_by="set --config.eval"),
    scenes=dict(kind="scenes", task="text", split="train", size=3),
    tfds=dict(kind="tfds", name="imagenet2012", split="train"),
  )
  train = functools.partial(
    common.stage,
    "train",
    inputs=dict(vision=c.vision.get_ref("init"), llm="package:toy:llm"),
  )
  c.train = train(data=(("chat", 1.0),), max_length=500, long="error")
  c.later = train(data="again", max_length=400, objective="dpo", long="error")
  return c
"""
SIZES = dict(
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=2,
  num_attention_heads=2,
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
  """Return the folder that is worked in, which has an image and a config."""
  monkeypatch.syspath_prepend(ROOT)
  monkeypatch.chdir(tmp_path)
  pathlib.Path("images").mkdir()
  Image.new("RGB", (6, 4)).save("images/a.png")
  pathlib.Path("recipe.py").write_text(CONFIG)
  return tmp_path


def _write(name: str, *rows) -> None:
  text = "".join(json.dumps(row) + "\n" for row in rows)
  pathlib.Path(name).write_text(text)


def _recipe(*lines: str) -> None:
  """Add lines to the config, before it is returned."""
  more = "".join(f"  {line}\n" for line in lines)
  text = CONFIG.replace("  return c\n", f"{more}  return c\n")
  pathlib.Path("recipe.py").write_text(text)


def _check(*options: str) -> int:
  return check.main(["recipe.py", "--out=out", *options])


def _kinds() -> list[tuple[int, str]]:
  lines = pathlib.Path("out/bad.jsonl").read_text().splitlines()
  return [(f["row"], f["kind"]) for f in map(json.loads, lines)]


def _report() -> dict:
  return json.loads(pathlib.Path("out/check.json").read_text())


def _long(**fields) -> dict:
  answer = {"from": "gpt", "value": "one " * 400}
  return ROW | {"conversations": [TALK[0], answer]} | fields


def test_a_config_says_what_is_checked_and_how(folder):
  _write("rows.jsonl", ROW, _long(id="b"))
  with open("rows.jsonl", "a") as file:
    file.write("{\n")
  assert _check() == 1
  assert _kinds() == [(1, "too_long"), (2, "bad_json")]
  report = _report()
  assert len(report["files"]) == 1
  assert report["settings"]["patches"] == 36
  assert report["settings"]["patches_are_known"]
  assert report["settings"]["max_length"] == {"rows.jsonl": 400}
  _write("other.jsonl", ROW)
  _check(*(f"--config.sources.{k}.path=other.jsonl" for k in ("chat", "again")))
  files = [file["file"] for file in _report()["files"]]
  assert files == ["other.jsonl", "rows.jsonl"]


def test_sources_that_are_not_looked_at_are_named(folder, capsys):
  _write("rows.jsonl", ROW)
  assert _check() == 0
  assert _report()["not_looked_at"] == {
    "none": "set --config.eval",
    "scenes": "kind='scenes' names no path",
    "tfds": "kind='tfds' names no path",
  }
  said = capsys.readouterr().out
  assert "tfds: not looked at (kind='tfds' names no path)\n" in said


def test_the_weights_of_an_arm_may_be_elsewhere(folder):
  _recipe(
    'c.arms = (common.arm("x", model="/elsewhere/llava", label="x"),)',
    'c.report, c.compared = common.stage("report"), ()',
    'c.order = (*c.order, "report")',
  )
  _write("rows.jsonl", ROW)
  assert _check() == 0


@pytest.mark.parametrize("long", ["drop", "truncate_answer"])
def test_rows_that_are_dropped_or_cut_are_noted(folder, capsys, long):
  _recipe(f'c.train.long = c.later.long = "{long}"')
  _write("rows.jsonl", ROW, _long(id="b"), _long(id="c"))
  assert _check() == 0
  assert _kinds() == []
  [file] = _report()["files"]
  assert (file["notes"], file["long"]) == ({"too_long": 2}, long)
  assert (file["good"], file["bad"]) == (3, {})
  assert f"2 too_long: none of them bad, as the stages have long={long}" in (
    capsys.readouterr().out
  )


def test_a_long_prompt_is_never_cut_and_so_a_fault(folder):
  _recipe('c.train.long = c.later.long = "truncate_answer"')
  asked = {"from": "human", "value": "<image>\n" + "how " * 400}
  _write("rows.jsonl", ROW | {"conversations": [asked, TALK[1]]}, _long(id="b"))
  assert _check() == 1
  assert _kinds() == [(0, "too_long")]
  assert _report()["notes"] == {"too_long": 1}


def test_a_row_that_only_one_stage_drops_is_a_fault_of_the_other(folder):
  _recipe('c.train.long = "drop"')
  _write("rows.jsonl", _long())
  assert _check() == 1
  assert _kinds() == [(0, "too_long")]


def test_long_rows_of_a_mixture_are_dropped_unless_a_stage_says_so(folder):
  pathlib.Path("list.yaml").write_text("datasets:\n- json_path: rows.jsonl\n")
  _write("rows.jsonl", _long(image="images/a.png"))
  keys = [f"--config.sources.{k}.path=list.yaml" for k in ("chat", "again")]
  keys.append("--config.sources.text.path=")
  keys += [f"--config.sources.{k}.image_root=" for k in ("chat", "again")]
  _recipe('c.train.long = c.later.long = "auto"')
  assert _check(*keys) == 0
  assert _report()["notes"] == {"too_long": 1}
  assert _check(*keys, "--config.train.long=error") == 1
  assert _kinds() == [(0, "too_long")]


def test_an_arm_that_never_sees_the_rejected_answer_does_not_count_it(folder):
  _recipe(
    'c.sources = dict(pairs=dict(kind="preference", path="pairs.jsonl",'
    ' image_root="images"))',
    'c.train.data, c.train.max_length = (("pairs", 1.0),), 100',
    'c.later.update(dict(data="", objective="dpo", max_length=100))',
  )
  _write("pairs.jsonl", PAIR | {"rejected": "two " * 100})
  assert _check() == 0
  assert _check("--config.later.data=pairs") == 1
  assert _kinds() == [(0, "too_long")]


def test_the_share_of_bad_rows_is_the_sources_own(folder, capsys):
  _write("rows.jsonl", ROW, ROW | {"id": "b", "image": "none.png"})
  _recipe("c.sources.again.max_bad = 0.5")
  assert _check() == 1
  said = capsys.readouterr().out
  assert "too many: rows.jsonl (1 of 2, allowed is a share of 0)" in said
  assert _check("--config.sources.chat.max_bad=0.5") == 0
  assert _report()["files"][0]["max_bad"] == 0.5
  assert _check("--max-bad=0.6") == 0
  assert _check("--max-bad=0.4", "--config.sources.chat.max_bad=0.5") == 1


def test_rows_are_read_by_the_templates_of_their_stages(folder):
  twice = TALK + [{"from": "human", "value": "and now"}, TALK[1]]
  _write("rows.jsonl", ROW, ROW | {"id": "b", "conversations": twice})
  assert _check() == 0
  _recipe('c.later.template = "plain"')
  assert _check() == 1
  assert _kinds() == [(1, "schema")]
  # Nor does a stage read anything that does not run.
  _recipe('c.later.template = "plain"', "c.later.only_if_used = True")
  assert _check() == 0
  _recipe(
    'c.later.template = "plain"',
    "c.later.only_if_used = True",
    'c.train.inputs = dict(vision="@later:vision", llm="package:toy:llm")',
    'c.order = ("later", "train")',
  )
  assert _check() == 1
  _recipe('c.later.template = "plain"', 'c.order = ("train",)')
  assert _check() == 0


@pytest.mark.parametrize("field", ["template", "mask", "long", "resample"])
def test_a_setting_that_no_row_could_be_read_by_is_said_once(folder, field):
  _recipe(f'c.later.{field} = "other"')
  _write("rows.jsonl", ROW)
  with pytest.raises(InputError, match=f"recipe.py: later.*{field}=.*other"):
    _check()


def test_images_too_elongated_to_be_cropped_are_found(folder):
  Image.new("RGB", (1, 50_000)).save("images/thin.png")
  two = TALK[0] | {"value": "<image><image> which"}
  _write(
    "rows.jsonl",
    ROW,
    ROW | {"id": "b", "image": "thin.png"},
    ROW | {"id": "c", "image": ["a.png"] * 2, "conversations": [two, TALK[1]]},
  )
  assert _check() == 0
  _recipe('c.resample = "crop_bicubic:248"')
  assert _check() == 1
  assert _kinds() == [(1, "undecodable_image")]
  assert _report()["files"][0]["images"] == 3
  assert _check("--no-decode") == 0
  # 48 pixels cannot be cut out of fewer.
  with pytest.raises(InputError, match="crop_bicubic:40 scales the shortest"):
    _check("--config.resample=crop_bicubic:40")


def test_pictures_of_a_folder_are_cropped_as_their_source_does(folder):
  for split in ("train", "val"):
    place = folder / "classes" / split
    for name, size in (("x", (1, 50_000)), ("y", (6, 4))):
      (place / name).mkdir(parents=True)
      Image.new("RGB", size).save(place / name / "a.png")
  _recipe(
    'c.sources = dict(pictures=dict(kind="classify", path="classes",'
    ' split="val"))',
    'c.train.data = (("pictures", 1.0),)',
    'c.later = common.stage("report")',
    'c.resample = "crop_bicubic"',
  )
  assert _check() == 1
  assert _kinds() == [(0, "undecodable_image")]
  # A source that frames its images hands over squares.
  _recipe(
    'c.sources = dict(pictures=dict(kind="classify", path="classes",'
    ' split="val", image_size=8))',
    'c.train.data = (("pictures", 1.0),)',
    'c.later = common.stage("report")',
    'c.resample = "crop_bicubic"',
  )
  assert _check() == 0


def _patches(address: str) -> int | None:
  found = _encoder(address)
  return found and found.num_patches


def _encoder(address: str, **sizes) -> vit.VisionConfig | None:
  """Return the encoder of a stage that starts from an address."""
  step = _step("train", dict(vision=address), **sizes)
  return check_config.encoder(step, {})


def _step(name: str, inputs: dict, **sizes) -> Step:
  config = ml_collections.ConfigDict(dict(vision=dict(init="", **sizes)))
  return Step(name, "train", config, inputs, pathlib.Path(name))


def test_patches_are_those_of_the_encoder_whatever_describes_it(tmp_path):
  sizes = SIZES | dict(image_size=384, patch_size=14)
  fresh = _encoder("", **sizes)
  assert fresh and fresh.num_patches == 27**2
  assert _patches("package:toy:vision") == 36
  assert _patches("bv:a.npz") is None
  assert _patches("hf:owner/name") is None
  assert _patches(f"hf:{tmp_path}") is None
  assert _patches(f"{tmp_path}:vision") is None
  file = tmp_path / "config.json"
  siglip = dict(model_type="siglip_vision_model", image_size=224, patch_size=16)
  file.write_text(json.dumps(siglip))
  found = _encoder(f"hf:{tmp_path}")
  assert found and (found.image_size, found.num_patches) == (224, 14**2)
  both = dict(model_type="siglip", vision_config=sizes, image_size=1)
  file.write_text(json.dumps(both))
  address = f"hf:{tmp_path}:vision"
  found = _encoder(address)
  assert found and (found.image_size, found.num_patches) == (384, 27**2)
  assert _patches(f"{address}?tokens=576") == 576
  found = _encoder(f"hf:{tmp_path}?image_size=378&positions=dinov2")
  assert found and (found.image_size, found.num_patches) == (378, 27**2)
  file.write_text("no JSON")
  assert _encoder(f"hf:{tmp_path}") is None
  model = dict(vision=sizes | dict(feature_tokens=256), llm=None)
  (tmp_path / "model.json").write_text(json.dumps(model))
  found = _encoder(f"{tmp_path}:vision")
  assert found and (found.image_size, found.num_patches) == (384, 256)


def test_an_encoder_that_a_stage_makes_is_followed_to_its_start(tmp_path):
  fresh = SIZES | dict(image_size=64, patch_size=8)
  described = dict(
    model_type="siglip_vision_model", image_size=32, patch_size=8
  )
  (tmp_path / "config.json").write_text(json.dumps(described))
  for inputs, patches in (
    ({}, 64),
    (dict(vision=f"hf:{tmp_path}"), 16),
    (dict(init=f"hf:{tmp_path}"), 16),
  ):
    first = _step("first", inputs, **fresh)
    second = _step("second", dict(init="first"), **fresh)
    third = _step("third", dict(vision="second:vision", llm="x"))
    made = {step.name: step for step in (first, second)}
    found = check_config.encoder(third, made)
    assert found and found.num_patches == patches


def test_a_guess_of_the_tokens_of_an_image_is_called_one(folder, capsys):
  _write("rows.jsonl", ROW)
  keys = ["--config.vision.init=bv:encoder.npz", "--max-length=0"]
  assert _check(*keys) == 0
  said = capsys.readouterr().out
  assert "729 for an image, which is a guess: give --patches" in said
  assert not _report()["settings"]["patches_are_known"]
  assert _check(*keys, "--patches=10") == 0
  assert "guess" not in capsys.readouterr().out


def test_a_config_without_a_tokenizer_judges_no_length(folder):
  _recipe('c.tokenizer = ""')
  _write("rows.jsonl", _long())
  assert _check() == 0
  assert not _report()["settings"]["too_long_is_judged"]
  assert _check("--tokenizer=package:toy") == 1


def test_an_entry_that_cannot_be_opened_is_one_fault(folder):
  _write("rows.jsonl", ROW)
  _write("empty.jsonl")
  pathlib.Path("cut.parquet").write_bytes(b"PAR1")
  keys = ["--config.sources.chat.path=empty.jsonl"]
  assert _check(*keys, "--config.sources.text.path=cut.parquet") == 1
  assert _kinds() == [(None, "schema"), (None, "unreadable")]
  assert [f["rows"] for f in _report()["files"]] == [1, 0, 0]


@pytest.mark.parametrize(
  "given, said",
  [
    (
      ["recipe.py", "--config.nothing=1"],
      "--config.nothing: the recipe has no 'nothing'",
    ),
    (["recipe.py", "--other=1"], "--other=1: unknown"),
    (["recipe.py", "rows.jsonl"], "recipe.py: give one config, or files"),
    (["recipe.py", "--template=plain"], "--template=plain: is for files"),
    (["absent.py:files"], "absent.py: no such recipe or file"),
    (["broken.py"], "broken.py:1: ZeroDivisionError: division"),
    (["typo.py"], "typo.py:1: SyntaxError: "),
    (["lacks.py"], "lacks.py:1: ModuleNotFoundError: No module named 'absent'"),
    (["refuses.py:x"], "refuses.py:2: ValueError: no x"),
    (["recipe.py"], "rows.jsonl: no such file"),
  ],
)
def test_a_config_that_cannot_be_used_is_said_in_a_line(folder, given, said):
  pathlib.Path("broken.py").write_text("1 / 0")
  pathlib.Path("typo.py").write_text("def")
  pathlib.Path("lacks.py").write_text("import absent")
  pathlib.Path("refuses.py").write_text(
    "def get_config(name):\n  raise ValueError('no ' + name)\n"
  )
  with pytest.raises(InputError, match=said) as error:
    check.main([*given, "--out=out"])
  assert "\n" not in str(error.value)


def test_the_recipe_of_given_files_can_be_checked(folder):
  _write("rows.jsonl", ROW, _long(id="b"))
  given = dict(pretrain="rows.jsonl", images="images", max_bad=0.5)
  keys = [f"--config.files.{key}={value}" for key, value in given.items()]
  assert check.main(["pivot:files", *keys, "--out=out"]) == 0
  assert _report()["files"][0]["max_bad"] == 0.5
  assert _report()["settings"]["max_length"] == {"rows.jsonl": 2048}
  assert _report()["not_looked_at"]["eval"] == "set --config.files.eval"


def test_one_file_of_a_recipe_is_judged_without_the_others(folder):
  talk = [TALK[0], {"from": "gpt", "value": "one " * 2100}]
  _write("pairs.jsonl", PAIR, PAIR | {"id": "q", "rejected": "two " * 2100})
  _write("rows.jsonl", ROW | {"conversations": talk})
  config = f"{ROOT / 'configs' / 'pivot.py'}:files"
  keys = ["--config.files.preference=pairs.jsonl"]
  keys.append("--config.files.images=images")
  assert check.main([config, *keys, "--out=out"]) == 1
  assert _kinds() == [(1, "too_long")]


def test_a_config_that_is_no_recipe_is_said_in_a_line(folder):
  _recipe("del c.seeds")
  _write("rows.jsonl", ROW)
  with pytest.raises(InputError, match="recipe.py: has no value .*seeds"):
    _check()
