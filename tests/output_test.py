"""Names and messages out of data come to people as lines that do not act."""

import html.parser
import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from pivot_jax import command_line, metrics, output, texts, trees
from pivot_jax.data import __main__ as data
from pivot_jax.data.sources import json_index
from pivot_jax.data.tools import show, shown_page, shown_rows
from pivot_jax.errors import InputError
from pivot_jax.recipe import plan
from pivot_jax.recipe.inputs import Step
from pivot_jax.report import charts, compare, tables
from pivot_jax.weights import card

CLEAR = "a\x1b[2J\x9b3J\u202ex\r\nerror: all is well"
SPELT = "\\x1b[2J\\x9b3J\\u202ex"


def check_calm(text: str, lines: int = 1) -> None:
  assert text.count("\n") == lines and text.endswith("\n")
  assert all(len(line) < 30_000 for line in text.split("\n"))
  assert not {"\x1b", "\x9b", "\u202e", "\r"} & set(text)


def log_line(message: str, *arguments: object) -> str:
  handler, stream = output.handler(), io.StringIO()
  handler.setStream(stream)
  made = logging.LogRecord("x", 20, "f", 1, message, arguments, None)
  handler.emit(made)
  return stream.getvalue()


@pytest.mark.parametrize("name", [CLEAR, "x" * 99_000_000])
def test_a_record_of_the_log_is_one_short_line(name):
  check_calm(log_line("%s: %d rows", name, 3))


def test_the_traceback_of_a_record_keeps_its_lines():
  handler, stream = output.handler(), io.StringIO()
  handler.setStream(stream)
  try:
    raise KeyError("a")
  except KeyError:
    found = sys.exc_info()
  handler.emit(logging.LogRecord("x", 40, "f", 1, "bad", (), found))
  said = stream.getvalue().splitlines()
  assert said[0] == "bad" and said[-1] == "KeyError: 'a'" and len(said) > 3


@pytest.mark.parametrize("name", [CLEAR, "x" * 99_000_000])
def test_the_error_that_ends_a_command_is_one_short_line(name, capsys):
  with pytest.raises(SystemExit) as left:
    command_line.leave(f"error: {name}: bad", 2)
  assert left.value.code == 2
  said = capsys.readouterr().err
  check_calm(said)
  assert said.startswith("error: ") and said.endswith(": bad\n")


def test_data_names_a_hostile_file_in_a_line(tmp_path, capsys):
  assert data.main(["show", str(tmp_path / f"{CLEAR}.jsonl")]) == 2
  said = capsys.readouterr().err
  check_calm(said)
  assert "\\x1b[2J" in said


def test_check_names_files_ids_and_keys_in_lines(tmp_path, capsys):
  folder = tmp_path / "a\x1b[2Jb"
  folder.mkdir()
  row = {"id": CLEAR, "image": CLEAR, CLEAR: 1, "conversations": []}
  (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
  out = tmp_path / "out\x1b[3J"
  assert data.main(["check", str(folder / "a.jsonl"), f"--out={out}"]) == 1
  said = capsys.readouterr().out
  check_calm(said, said.count("\n"))
  assert "a\\x1b[2Jb" in said and "out\\x1b[3J" in said
  assert "\nerror: all is well" not in said


def test_a_row_that_is_shown_has_a_short_head():
  error = "x" * 1_000_000
  shown = shown_rows.Shown(f"a\x1b[2J{error}", error, (), (), (), (error,))
  drawn = show.draw_row(shown, show.Look())
  assert len(drawn) < 10_000 and "\x1b" not in drawn


def test_the_plan_has_a_line_a_stage():
  step = Step("one", "train", ConfigDict({}), {"init": f"x\n{CLEAR}"}, None)
  planned = plan.Plan((step,), {"two": f"no data: {CLEAR}"})
  check_calm(plan.describe(planned) + "\n", lines=3)


def test_the_table_of_weights_has_a_line_a_part():
  tree = {f"vision{CLEAR}": {"a": np.zeros(2, np.float32)}}
  prints = trees.fingerprint(tree)
  said = trees.table(prints, tree, {f"vision{CLEAR}": CLEAR * 999}, [".*"])
  check_calm(said + "\n", lines=2)


def test_the_bar_of_an_index_names_the_file_in_a_line(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(
    json_index.tqdm, "tqdm", lambda **how: said.append(how["desc"]) or 1 / 0
  )
  path = tmp_path / f"{CLEAR.replace('/', '')}.jsonl"
  path.write_text("{}\n")
  with pytest.raises(ZeroDivisionError):
    json_index.File(path)
  check_calm(said[0] + "\n")
  assert len(output.label("reading", "x" * 9999)) < 120


def test_the_status_of_a_stage_is_a_line(capsys):
  metrics.Status(CLEAR, 1).show(1, CLEAR)
  check_calm(capsys.readouterr().err)


# --- pages --------------------------------------------------------------------

MARK = '"><meta http-equiv="refresh" content="0;url=x"><script>1</script>'


class Tags(html.parser.HTMLParser):
  def __init__(self, page: str):
    super().__init__()
    self.found: set[str] = set()
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    del attrs
    self.found.add(tag)


@pytest.mark.parametrize("field", ["n", "note", "way"])
def test_a_measure_puts_no_tag_into_the_report(field):
  column = tables.Column("k", MARK, MARK, 1, 1)
  found = {"value": 0.5, "n": 3, "se": None, "shown": True} | {field: MARK}
  for make in (tables.measures, tables.differences):
    tags = Tags(make({MARK: {"k": found}}, [column])).found
    assert not {"meta", "script"} & tags


def test_a_curve_and_a_row_put_no_tag_into_a_page():
  drawn = charts.chart(MARK, {MARK: [(0.0, 1.0), (1.0, 2.0)]})
  assert not {"meta", "script"} & Tags(drawn).found
  token = shown_rows.Token(MARK, (1,), 0, True)
  part = shown_rows.Part(MARK, (token,), 1, 1, 0)
  row = shown_rows.Shown(MARK, MARK, (), (part,), ((MARK, MARK),), (MARK,))
  page = shown_page.page(MARK, [shown_page.section(MARK, MARK, [row])])
  assert "<script" not in page and page.count("<meta") == 3


DONE = {
  **{"kind": "evaluate", "fields": {}, "metrics": {}, "seconds": 1.0},
  "versions": {"jax": "1"},
}


@pytest.mark.parametrize(
  "field, changed",
  [
    ("kind", {"kind": 1}),
    ("metrics", {"metrics": []}),
    ("seconds", {"seconds": MARK}),
    ("versions", {"versions": "1"}),
    ("metrics.all.n", {"metrics": {"all": {"value": 1, "n": MARK}}}),
    ("metrics.all.se", {"metrics": {"all": {"value": 1, "se": [1]}}}),
    ("metrics.all.value", {"metrics": {"all": {"value": True}}}),
    ("metrics.all.value", {"metrics": {"all": {"value": 10**400}}}),
  ],
)
def test_a_record_of_another_type_is_named_by_file_and_field(
  tmp_path, field, changed
):
  (tmp_path / "done.json").write_text(json.dumps(DONE))
  assert compare.by_seed({"evaluate": str(tmp_path)})
  (tmp_path / "done.json").write_text(json.dumps(DONE | changed))
  with pytest.raises(InputError, match=f"done.json: {field} is") as error:
    compare.by_seed({"evaluate": str(tmp_path)})
  assert len(str(error.value)) < 400


@pytest.mark.parametrize(
  "line", ['{"step": 1, "loss": "<b>"}', "[1]}", '{"loss": 1}', "{x}"]
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
  with pytest.raises(InputError, match="metrics.jsonl, line 2"):
    metrics.read(tmp_path)


def test_a_cut_line_of_metrics_is_dropped_at_the_end_alone(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo')
  assert len(metrics.read(tmp_path)) == 1
  path.write_text('{"step": 1, "lo\n{"step": 2}\n')
  with pytest.raises(InputError, match="line 1"):
    metrics.read(tmp_path)


@pytest.mark.parametrize(
  "row, why",
  [
    ('{"id": 1, "category": "a", "kind": "b", "correct": true}', "id is no"),
    ('{"id": "1", "category": "a", "kind": "b", "correct": 7}', "correct"),
    ('{"id": "1"', "not readable"),
  ],
)
def test_a_damaged_line_of_predictions_is_named(tmp_path, row, why):
  (tmp_path / "predictions.jsonl").write_text(row + "\n")
  with pytest.raises(InputError, match=f"predictions.jsonl.*1.*{why}"):
    compare._answers(tmp_path)


# --- Markdown -----------------------------------------------------------------


@pytest.mark.parametrize(
  "text, code",
  [
    ("a`\n\n# Certified", "``a`\\n\\n# Certified``"),
    ("`` ` ```", "```` `` ` ``` ````"),
    ("a|b", "`a¦b`"),
    ("", "`-`"),
    (" a", "`  a `"),
  ],
)
def test_code_ends_where_it_is_meant_to(text, code):
  assert texts.code_span(text) == code
  assert len(texts.code_span(text * 10_000 + "x")) < 2_000


def test_a_card_of_somebody_elses_artifact_has_its_own_headings_alone():
  bad = "x`\n\n# Certified\n\n<img src=x> [a](http://x) www.x.com\n\n`"
  vision = {
    **dict(family="siglip", feature_layer=-2, final_norm=False, patch_size=8),
    **dict(num_hidden_layers=3, hidden_size=bad, image_size=24),
    **dict(layer_norm_eps=1e-6, image_mean=[bad], image_std=bad),
  }
  meta = {
    "vision": vision,
    "sources": {bad: bad},
    "unread": {"address": bad, "fingerprint": bad, "modules": [bad]},
    "versions": {bad: bad},
    "preprocessing": {"resample": bad},
  }
  said = card.text(meta, None, bad, "SiglipVisionModel")
  own = card.text(
    meta | {"sources": {}, "versions": {"jax": "1"}}, None, "a", "timm"
  )
  heads = [x for x in said.splitlines() if x.startswith("#")]
  assert heads == [x for x in own.splitlines() if x.startswith("#")]
  # Nothing of it stands outside code.
  assert all("<img" not in part for part in said.split("``")[::2])


def test_an_id_is_no_markup_in_tensorboard(tmp_path, monkeypatch):
  board, said = metrics.Board(tmp_path, 0), []
  monkeypatch.setattr(board._board, "add_text", lambda *one: said.append(one))
  board.write_samples([("x\n\n# <b>", (), "text")])
  board.write_samples([("row-1", (), "text")])
  board.close()
  assert [text.split("\n\n")[0] for _, text, _ in said] == [
    "`x\\n\\n# <b>`",
    "row-1",
  ]


def test_a_run_of_a_hostile_name_ends_in_a_line(tmp_path):
  found = subprocess.run(
    [sys.executable, "-m", "pivot_jax.main", f"--config={tmp_path}/{CLEAR}.py",
     f"--workdir={tmp_path}/w"],
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert found.returncode == 2
  check_calm(found.stderr)
