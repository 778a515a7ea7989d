"""Mixtures of LLaVA files: which rows they take, and the paper's own lists."""

import json
import logging
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from pivot_jax import addresses
from pivot_jax.configs import paper_data
from pivot_jax.data import coders, images, opener, streams
from pivot_jax.data.sources import mixtures
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

LISTS = pathlib.Path(paper_data.__file__).parent / "data"


@pytest.fixture
def write(tmp_path):
  """Write files of so many rows, and a list of entries over them."""

  def write(counts, *entries, name="mix.yaml"):
    for path, count in counts.items():
      turns = [
        {"from": "human", "value": f"{path}?"},
        {"from": "gpt", "value": "yes"},
      ]
      rows = [dict(id=f"r{i}", conversations=turns) for i in range(count)]
      file = tmp_path / path
      file.parent.mkdir(parents=True, exist_ok=True)
      lines = [json.dumps(row) for row in rows]
      if path.endswith(".jsonl"):
        file.write_text("".join(line + "\n" for line in lines))
      else:
        file.write_text("[" + ", ".join(lines) + "]")
    (tmp_path / name).write_text(json.dumps({"datasets": entries}))
    return tmp_path / name

  return write


def entry(path, strategy="all", **more):
  return dict(json_path=path, sampling_strategy=strategy, **more)


def ids(mixture):
  return [mixture.text(i)["id"] for i in range(len(mixture))]


def numbers(mixture):
  return [int(name.rpartition("/r")[2]) for name in ids(mixture)]


@pytest.mark.parametrize(
  ("strategy", "rows"),
  [
    ("all", range(10)),
    ("first:3", range(3)),
    ("end:3", range(7, 10)),
    ("first:25%", range(3)),  # 2.5 rows, rounded up.
    ("end:1%", range(9, 10)),
    ("first:30%", range(3)),  # Exactly 3: no fourth by an error of floats.
    ("first:100%", range(10)),
  ],
)
def test_strategies_take_rows_from_either_end(write, strategy, rows):
  path = write({"a.json": 10}, entry("a.json", strategy))
  assert numbers(mixtures.Mixture(path)) == list(rows)


@pytest.mark.parametrize(
  ("percent", "rows", "taken"),
  [("0.1%", 1000, 1), ("7%", 100, 7), ("55%", 100, 55), ("1%", 256_646, 2567)],
)
def test_percents_are_exact(percent, rows, taken):
  assert mixtures.Entry("a.json", f"first:{percent}").count(rows) == taken


def test_random_rows_are_different_ones_and_hang_on_the_seed(write):
  path = write(
    {"a.json": 100, "b.json": 100},
    entry("a.json", "random:30"),
    entry("b.json", "random:30%"),
  )
  one, same, other = (mixtures.Mixture(path, seed=s) for s in (0, 0, 1))
  assert ids(one) == ids(same) != ids(other)
  first, second = numbers(one)[:30], numbers(one)[30:]
  assert len(set(first)) == len(set(second)) == 30 and first != second
  assert first == sorted(first)


def test_a_mixture_is_its_files_one_after_the_other(write):
  path = write(
    {"x/a.json": 3, "b.jsonl": 2},
    entry("x/a.json", "end:2"),
    {"json_path": "b.jsonl"},
  )
  mixture = mixtures.Mixture(path)
  assert ids(mixture) == ["a/r1", "a/r2", "b/r0", "b/r1"]
  assert mixture.name(0) == f"{path.parent}/x/a.json#1"
  assert mixture.name(3) == f"{path.parent}/b.jsonl:2"
  assert mixture[2]["conversations"][0]["value"] == "b.jsonl?"
  assert mixture[2] == mixture.text(2) and mixture.encoded(2) == ()
  for index in (-1, 4):
    with pytest.raises(IndexError):
      mixture.text(index)


def test_images_are_in_the_root_or_where_it_is_said(write, tmp_path):
  path = write({"a.json": 1}, entry("a.json"))
  row = json.loads((tmp_path / "a.json").read_text())[0] | {"image": "x.png"}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "images").mkdir()
  for side, folder in ((3, tmp_path), (4, tmp_path / "images")):
    Image.new("RGB", (side, side)).save(folder / "x.png")
  assert mixtures.Mixture(path)[0]["image"].shape == (3, 3, 3)
  apart = mixtures.Mixture(path, None, tmp_path / "images")
  assert apart[0]["image"].shape == (4, 4, 3)
  assert apart.text(0)["image"] == "x.png"
  assert apart.encoded(0) == ((tmp_path / "images/x.png").read_bytes(),)
  small = mixtures.Mixture(path, tmp_path, image_spec=images.ImageSpec(8))
  assert small[0]["image"].shape == (8, 8, 3)


def test_epochs_repeat_rows_under_ids_of_their_own(write):
  path = write(
    {"a.json": 3, "a#2.json": 1},
    entry("a.json", "first:2", epochs=2),
    entry("a.json", "end:1"),
    entry("a#2.json"),
  )
  mixture = mixtures.Mixture(path)
  assert numbers(mixture) == [0, 1, 0, 1, 2, 0]
  assert ids(mixture) == [
    "a/r0", "a/r1", "a#2/r0", "a#2/r1", "a#3/r2", "a#2#2/r0",
  ]  # fmt: skip


def test_weights_share_out_the_same_number_of_rows(write):
  path = write(
    {"a.json": 10, "b.json": 30},
    entry("a.json", weight=3),
    entry("b.json", weight=1.0),
  )
  mixture = mixtures.Mixture(path)
  assert len(mixture) == 40 and len(set(ids(mixture))) == 40
  lines = mixtures.describe(mixture)
  assert [(line.rows, line.taken) for line in lines] == [(10, 30), (30, 10)]
  assert numbers(mixture)[:30] == 3 * list(range(10))
  assert len(set(numbers(mixture)[30:])) == 10


def test_weights_take_parts_of_epochs(write):
  path = write(
    {"a.json": 10, "b.json": 10},
    entry("a.json", weight=2),
    entry("b.json", weight=1),
  )
  taken = [line.taken for line in mixtures.describe(mixtures.Mixture(path))]
  assert taken == [14, 6]  # 13.3 and 6.7, rounded down, and one more in front.
  first = numbers(mixtures.Mixture(path))[:14]
  assert first[:10] == list(range(10)) and len(set(first[10:])) == 4


def test_describe_says_what_is_taken_of_what(write):
  path = write(
    {"a.json": 10, "b.json": 4},
    entry("a.json", "first:5%", expected=10),
    entry("b.json", epochs=3),
  )
  assert mixtures.describe(mixtures.Mixture(path)) == (
    mixtures.Line("a", 10, 1, 10),
    mixtures.Line("b", 4, 12, None),
  )


def test_a_log_says_what_several_files_give(write, caplog):
  path = write(
    {"a.json": 10, "b.json": 4},
    entry("a.json", "first:5%", expected=10),
    entry("b.json", epochs=3),
  )
  with caplog.at_level(logging.INFO, "pivot_jax"):
    mixtures.log(mixtures.Mixture(path))
  assert caplog.messages == [
    f"{path}: a: 1 rows of 10, 10 expected",
    f"{path}: b: 12 rows of 4",
  ]
  caplog.clear()
  with caplog.at_level(logging.INFO, "pivot_jax"):
    mixtures.log(mixtures.Mixture(write({}, entry("a.json"), name="one.yaml")))
  assert not caplog.messages


def test_the_log_has_a_mixture_once_and_only_for_a_stream(write, caplog):
  path = write({"a.json": 4, "b.json": 4}, entry("a.json"), entry("b.json"))
  coder = coders.Coder(
    tokenizer=load_tokenizer(addresses.tokenizer_folder("package:toy")),
    template="qwen_1_5", mask="paper", pairs=False, image_size=8, patches=4,
    resample="bicubic", max_length=2048, long="error",
  )  # fmt: skip
  with caplog.at_level(logging.INFO, "pivot_jax"):
    for kind in ("mixture", "llava"):
      spec = {"kind": kind, "path": str(path)}
      assert opener.open_source(spec).stamp()
      assert not caplog.messages
      streams.open_stream([(spec, 1.0)], coder, seed=0)
      assert len(caplog.messages) == 2
      caplog.clear()


def test_a_seed_under_zero_is_refused(write):
  path = write({"a.json": 3}, entry("a.json", "random:1"))
  with pytest.raises(InputError, match=r"mix\.yaml: seed=-1: give 0 or more"):
    mixtures.Mixture(path, seed=-1)


def test_files_of_another_length_are_one_error_or_a_warning(write, caplog):
  path = write(
    {"a.json": 3, "b.json": 4, "c.json": 5},
    entry("a.json", expected=3),
    entry("b.json", expected=14),
    entry("c.json", expected=15),
  )
  match = (
    r"b\.json: 4 rows, expected 14; .*c\.json: 5 rows, expected 15.*strict"
  )
  with pytest.raises(InputError, match=match) as caught:
    mixtures.Mixture(path)
  assert "a.json" not in str(caught.value)
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    assert len(mixtures.Mixture(path, strict=False)) == 12
  assert "b.json: 4 rows, expected 14" in caplog.text


def test_files_that_are_not_there_are_one_error(write):
  path = write(
    {"a.json": 3}, entry("a.json"), entry("b.json"), entry("x/c.json")
  )
  with pytest.raises(InputError, match=r"2 of 3 files .* b\.json, x/c\.json"):
    mixtures.Mixture(path)


def test_more_rows_than_there_are_cannot_be_taken(write):
  path = write({"a.json": 3}, entry("a.json", "first:4"))
  with pytest.raises(InputError, match=r"a\.json: first:4 of 3 rows"):
    mixtures.Mixture(path)


def test_nothing_is_no_mixture(write):
  path = write({"a.json": 0}, entry("a.json"))
  with pytest.raises(InputError, match="the mixture is empty"):
    mixtures.Mixture(path)
  path = write(
    {"a.json": 0, "b.json": 3},
    entry("a.json", weight=1),
    entry("b.json", weight=1),
  )
  with pytest.raises(InputError, match=r"a\.json: has a weight and no rows"):
    mixtures.Mixture(path)


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("datasets: [", "not valid YAML"),
    ("- json_path: a.json", "datasets: must be a list"),
    ("datasets: []", "datasets: must be a list"),
    ("datasets: [a.json]", r"datasets\[0\]: must have the key json_path"),
    ("datasets: [{json_path: a.yaml}]", "must name a .json or .jsonl"),
    ("datasets: [{json_path: a.json, max: 3}]", "max: unknown; keys are"),
    (
      "datasets: [{json_path: a.json, sampling_strategy: last:3}]",
      "'last:3' is none of all, first:N",
    ),
    (
      "datasets: [{json_path: a.json, sampling_strategy: 'first:-3'}]",
      "'first:-3' is none of",
    ),
    (
      "datasets: [{json_path: a.json, epochs: 1.5}]",
      "epochs: 1.5 is no number",
    ),
    ("datasets: [{json_path: a.json, weight: 0}]", "weight: 0 is no number"),
    ("datasets: [{json_path: a.json, weight: .inf}]", "weight: inf is no num"),
    ("datasets: [{json_path: a.json, weight: .nan}]", "weight: nan is no num"),
    ("datasets: [{json_path: a.json, weight: true}]", "weight: True is no nu"),
    ("datasets: [{json_path: 3}]", "json_path: must be text, not 3"),
    (
      'datasets: [{json_path: "\\ud800.json"}]',
      "json_path: has half a surrogate pair",
    ),
    ("datasets: [{json_path: a.json, expected: x}]", "expected: 'x' is no"),
    ("datasets: [{json_path: a.json, epochs: 2, weight: 1}]", "not both"),
    (
      "datasets: [{json_path: a.json, weight: 1}, {json_path: b.json}]",
      r"b\.json: weight: give all entries one or none",
    ),
    ("datasets: [!!python/object/apply:os.getcwd []]", "not valid YAML"),
  ],
)
def test_a_list_that_is_none_is_refused_in_one_line(tmp_path, text, match):
  (tmp_path / "mix.yaml").write_text(text)
  with pytest.raises(InputError, match=match) as caught:
    mixtures.read(tmp_path / "mix.yaml")
  assert "mix.yaml: " in str(caught.value) and "\n" not in str(caught.value)


def test_only_numbers_of_rows_are_held(write):
  path = write({"a.json": 2000}, entry("a.json", "random:50%", epochs=2))
  held = [part.indices for part in mixtures.Mixture(path)._parts]
  assert [rows.dtype for rows in held] == [np.int32] * 2
  assert sum(rows.nbytes for rows in held) == 4 * 2000


# --- the paper's lists -------------------------------------------------------

# Paper.md 4.3: percent and rows of what is taken in part, and rows of the rest.
IN_PART = (
  (10, 33_626), (1, 256_646), (10, 74_502), (5, 19_218), (5, 17_597),
  (5, 22_599), (5, 35_958), (1, 70_000), (1, 200_000), (1, 100_000),
  (5, 42_000), (5, 27_307), (10, 98_680), (5, 27_307), (20, 263_584),
)  # fmt: skip
WHOLE = (
  738_590, 2_009, 87_358, 100_000, 8_835, 2_000, 4_874, 4_404, 1_992, 1_787,
  10_500, 20_000, 50_000, 25_114, 12_413, 21_952, 186_070, 29_837, 2_101,
  67_833, 60_252, 5_290, 9_734, 17_172, 508, 5_235, 8_652, 22_462, 11_959,
  6_614, 2_434, 16_539, 26_961, 18_265, 300, 9_303, 8_500, 2_500, 5_663, 2_118,
  1_280, 37_417, 7_619, 10_000, 8_514, 74_989, 38_246, 15_730, 4_976, 22_722,
  17_247, 14_366, 3_027, 313, 2_157, 9_969, 10_000,
)  # fmt: skip
# Of about 300,000 rows each; the names of the files have these numbers.
MAGPIE = (299_992, 300_000, 299_998)


def taken(entries):
  return sum(e.count(e.expected) for e in entries if e.expected is not None)


def test_the_one_image_mixture_has_the_papers_87_files_and_their_counts():
  entries = mixtures.read(LISTS / "onevision.yaml")
  assert len(entries) == len({e.json_path for e in entries}) == 87
  whole = sorted(
    e.expected for e in entries if e.expected and "a" == e.strategy[0]
  )
  assert whole == sorted(WHOLE)
  parts = sorted(
    (e.strategy.removeprefix("first:"), e.expected)
    for e in entries
    if e.strategy != "all"
  )
  expected = [(f"{p}%", n) for p, n in IN_PART] + [("50%", n) for n in MAGPIE]
  assert parts == sorted(expected)
  assert all(e.epochs == 1 and e.weight is None for e in entries)


def test_the_one_image_mixture_takes_what_the_paper_says():
  entries = mixtures.read(LISTS / "onevision.yaml")
  in_part = sum(math.ceil(p * n / 100) for p, n in IN_PART)
  text = sum(math.ceil(n / 2) for n in MAGPIE)
  assert abs(text - 450_000) < 10  # "about 450K text-only".
  known = sum(WHOLE) + in_part + text
  assert taken(entries) == known == 2_435_964
  # Of 3.186M the rest is in twelve files whose names have no exact count, the
  # 122K of five such names (20k, 50k, 2k, 30k, 20k) among it.
  unknown = [e for e in entries if e.expected is None]
  assert len(unknown) == 12 and all(e.strategy == "all" for e in unknown)
  assert 3_186_000 - known > 122_000


def test_the_reassembly_mixture_has_770100_rows():
  entries = mixtures.read(LISTS / "cambrian.yaml")
  assert taken(entries) == 770_100 and len(entries) == 4
  stems = {e.json_path for e in mixtures.read(LISTS / "onevision.yaml")}
  assert all(e.json_path in stems and e.strategy == "all" for e in entries)


def test_the_captions_are_558128():
  (only,) = mixtures.read(LISTS / "llava_pretrain.yaml")
  assert (only.strategy, only.expected) == ("all", 558_128)


def test_every_list_is_an_entry_and_says_what_is_known_of_it():
  assert {path.stem for path in LISTS.iterdir()} == set(paper_data.MIXTURES)
  for name in paper_data.MIXTURES:
    spec = paper_data.mixture(name, root="datasets")
    entries = mixtures.read(LISTS / f"{name}.yaml")
    assert mixtures.read(spec["path"]) == entries
    assert (LISTS / f"{name}.yaml").read_text().startswith("# ")
  with pytest.raises(ValueError, match="choose one of"):
    paper_data.mixture("onevison", root="datasets")


def captions(folder, rows):
  """Write a file of the captions' name; returns its path in the list."""
  (only,) = mixtures.read(LISTS / "llava_pretrain.yaml")
  talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
  path = folder / only.json_path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps([{"conversations": talk}] * rows))
  return only.json_path


def test_a_foreign_list_in_the_current_folder_is_not_read(
  tmp_path, monkeypatch
):
  captions(tmp_path / "datasets", rows=3)
  foreign = tmp_path / "configs" / "data" / "llava_pretrain.yaml"
  foreign.parent.mkdir(parents=True)
  foreign.write_text("datasets:\n- json_path: foreign.json\n")
  monkeypatch.chdir(tmp_path)
  spec = paper_data.mixture("llava_pretrain", root="datasets", strict=False)
  assert len(opener.open_source(spec)) == 3
  # As a path it is one's own.
  spec["path"] = "configs/data/llava_pretrain.yaml"
  with pytest.raises(InputError, match="foreign.json"):
    opener.open_source(spec)


def test_the_recorded_list_is_the_same_text_on_every_machine():
  spec = paper_data.mixture("onevision", root="datasets")
  assert spec["path"] == "package:configs/data/onevision.yaml"


def test_a_list_is_read_by_its_path_in_a_clone_too(tmp_path, monkeypatch):
  captions(tmp_path, rows=2)
  monkeypatch.chdir(LISTS.parents[1])
  spec = paper_data.mixture("llava_pretrain", root=str(tmp_path), strict=False)
  stamps = [
    opener.open_source(spec | {"path": path}).stamp()
    for path in (spec["path"], spec["path"].removeprefix("package:"))
  ]
  assert stamps[0] == stamps[1]


def test_a_list_of_the_package_is_opened_by_its_name_alone(tmp_path):
  path = "package:configs/data/llava_pretrain.yaml"
  with pytest.raises(InputError, match=f"{path}: give root"):
    opener.open_path(path)
  with pytest.raises(InputError, match=f"{path}: 1 of 1 files are not in"):
    opener.open_path(path, root=str(tmp_path))
  with pytest.raises(InputError, match="no such file"):
    opener.open_path("package:configs/data/none.yaml")
