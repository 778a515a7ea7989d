"""A position holds one example, whoever reads it: resumed, shared, dropped, void."""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pivot_jax import addresses
from pivot_jax.data import coders, feed, lengths, streams
from pivot_jax.data.scenes import scenes
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
BATCH = 6

# Reads the ids of a run that is killed at an update and goes on from there.
READ = """
import os, sys
from tests.data import streams_test
start, count, threads, path = sys.argv[1:]
with open(path, "a") as file:
  for one in streams_test.ids(int(start), int(threads)):
    file.write(one + "\\n")
    file.flush()
    if file.tell() and int(count) == 0:
      os.kill(os.getpid(), 9)
    count = int(count) - 1
"""


def coder(**fields):
  return feed.Coder(
    **dict(
      tokenizer=TOKENIZER,
      template="qwen_1_5",
      mask="paper",
      pairs=True,
      image_size=48,
      patches=36,
    )
    | fields
  )


def preference(size=40):
  return scenes.Scenes(task="preference", size=size)


def stream(size=40, **fields):
  return feed.Stream([(preference(size), 1.0)], coder(), seed=5, **fields)


def ids(start, threads, batch=BATCH, share=None):
  """Yield the ids of updates from an example on."""
  found = feed.read(
    stream(),
    batch=batch,
    start=start,
    share=share or feed.Share(),
    threads=threads,
  )
  for example in found:
    yield example.id


def first(count, *args, **kwargs):
  return list(itertools.islice(ids(*args, **kwargs), count))


# --- resume ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_an_interrupted_stream_goes_on_as_the_straight_one(threads):
  straight = first(120, 0, 0)
  # Ten stops; an epoch of 40 ends within an update.
  stops = [0, *sorted(random.Random(threads).sample(range(1, 20), 10)), 20]
  seen = []
  for number, (start, stop) in enumerate(itertools.pairwise(stops)):
    count = (stop - start) * BATCH
    seen += first(count, start * BATCH, (threads + number) % 3)
  assert seen == straight
  assert sorted(straight[:40]) == sorted(straight[40:80])
  assert straight[:40] != straight[40:80]


def test_a_killed_process_leaves_off_where_another_goes_on(tmp_path):
  path, done = tmp_path / "ids.txt", 0
  for threads, count in ((0, 7), (2, 40), (1, 30)):
    start = done // BATCH * BATCH
    command = [sys.executable, "-c", READ, *map(str, (start, count, threads))]
    ended = subprocess.run(
      [*command, str(path)],
      check=False,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == -signal.SIGKILL
    # What was read of the broken update is read again.
    lines = path.read_text().split()
    lines = lines[:done] if len(lines) < done else lines
    kept = lines[: len(lines) // BATCH * BATCH]
    path.write_text("".join(one + "\n" for one in kept))
    done = len(kept)
  assert done >= 60
  assert path.read_text().split() == first(done, 0, 0)


def test_another_batch_size_goes_on_at_the_same_example():
  straight = first(60, 0, 0)
  assert first(30, 0, 1) + first(30, 30, 2, batch=10) == straight


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_processes_are_disjoint_and_complete(count):
  straight = first(60, 0, 0)
  size = BATCH // count
  shares = [
    first(60 // count, 0, 1, share=feed.Share(k, count)) for k in range(count)
  ]
  for update in range(10):
    parts = [x[update * size : (update + 1) * size] for x in shares]
    whole = straight[update * BATCH : (update + 1) * BATCH]
    assert [one for part in parts for one in part] == whole


def test_threads_read_the_same_pixels_and_pass_errors_on():
  plain, threaded = (
    list(stream().examples(range(12), threads=n)) for n in (0, 3)
  )
  for one, other in zip(plain, threaded, strict=True):
    assert one.id == other.id
    np.testing.assert_array_equal(one.images[0], other.images[0])
  columns = {}
  found = stream(reference=columns).examples(range(4), threads=2)
  with pytest.raises(InputError, match="has no reference log-probabilities"):
    list(found)


# --- rows that cannot be used ------------------------------------------------


@pytest.fixture
def spec(tmp_path):
  """Preference rows of which two have a broken image, 10 with good ones."""
  noise = np.random.default_rng(0).integers(1, 256, (30, 30, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "a.png")
  data = (tmp_path / "a.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
  rows = [
    dict(image="a.png", question=f"q {i}", chosen="yes", rejected="no")
    for i in range(12)
  ]
  rows[3]["image"], rows[8]["image"] = "cut.png", "gone.png"
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return dict(kind="preference", path=str(path))


def opened(spec, how=None, **fields):
  return streams.open_stream([(spec | fields, 1.0)], how or coder(), seed=0)


def test_an_unreadable_image_is_an_error_unless_some_are_allowed(spec):
  with pytest.raises(InputError, match=r"rows.jsonl:(4|9): image: "):
    list(opened(spec).examples(range(12)))
  with pytest.raises(
    InputError, match=r"2 of 12 rows .* share of 0.1: .*:9: .*:4: "
  ):
    list(opened(spec, max_bad=0.1).examples(range(12)))


def test_allowed_rows_take_their_places_without_weight(spec, caplog):
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    found = list(opened(spec, max_bad=0.2).examples(range(24), threads=2))
  plain = {e.id: e for e in opened(spec, max_bad=0.2).examples(range(12))}
  void = [example.id for example in found if example.void]
  assert sorted(void) == ["rows-3", "rows-3", "rows-8", "rows-8"]
  assert all((plain[i].images[0] == 0).all() for i in void)
  assert {e.images[0].shape for e in found} == {(48, 48, 3)}
  said = [r.getMessage() for r in caplog.records]
  assert len([s for s in said if "cut.png" in s]) == 2  # Once a stream.


def test_bad_text_is_left_out_before_the_order_is_made(spec, tmp_path):
  path = tmp_path / "rows.jsonl"
  lines = path.read_text().splitlines()
  lines[3], lines[8] = lines[0].replace("yes", "no"), "{oops"
  path.write_text("\n".join(lines))
  with pytest.raises(InputError, match="rows.jsonl:9: invalid JSON"):
    opened(spec)
  with pytest.raises(InputError, match="2 of 12 rows are bad.*:4: .*:9: "):
    opened(spec, max_bad=0.1)
  found = opened(spec, max_bad=0.2)
  seen = [example.id for example in found.examples(range(10))]
  assert sorted(seen) == sorted(
    f"rows-{i}" for i in range(12) if i not in (3, 8)
  )
  assert not any(example.void for example in found.examples(range(10)))
  assert found.every() == [(0, i) for i in range(12) if i not in (3, 8)]


def test_rows_named_by_a_check_are_left_out(spec, tmp_path):
  bad = tmp_path / "bad.jsonl"
  # The path is another spelling of the same file; a duplicate id is kept.
  path = tmp_path / ".." / tmp_path.name / "rows.jsonl"
  faults = [
    dict(file=str(path), row=3, kind="undecodable_image"),
    dict(file=str(path), row=8, kind="missing_image", drop=True),
    dict(file=str(path), row=5, kind="duplicate_id", drop=False),
    dict(file=str(tmp_path / "other.jsonl"), row=1, kind="schema"),
    dict(file=str(path), row=None, kind="schema"),
  ]
  bad.write_text("".join(json.dumps(one) + "\n" for one in faults))
  found = list(opened(spec, bad=str(bad)).examples(range(10)))
  assert len({example.id for example in found}) == 10
  assert not any(example.void for example in found)


# --- rows over the limit -----------------------------------------------------


def lengths_of_all():
  sizes = [stream().size(i) for i in range(40)]
  return sorted(size.sequence for size in sizes)


def limited(long, limit):
  how = coder(max_length=limit, long=long)
  return feed.Stream([(preference(), 1.0)], how, seed=5)


def test_a_long_row_is_an_error_or_left_out_and_counted(caplog):
  limit = lengths_of_all()[30]
  with pytest.raises(InputError, match=rf"scenes/.* over max_length={limit}"):
    list(limited("error", limit).examples(range(40)))
  with caplog.at_level(logging.WARNING, "pivot_jax"):
    found = limited("drop", limit)
  over = sum(size > limit for size in lengths_of_all())
  assert found.rows(0) == 40 - over
  assert f"{over} of 40 rows are over max_length={limit} and" in caplog.text
  sizes = [found.size(i) for i in range(found.rows(0))]
  assert max(size.sequence for size in sizes) == limit
  with pytest.raises(InputError, match="no row is left"):
    limited("drop", 10)


def test_only_answers_are_cut_and_their_cut_end_is_no_target():
  limit = lengths_of_all()[-1] - 3
  cut = limited("truncate_answer", limit)
  for position in range(40):
    whole, short = stream().example(position), cut.example(position)
    np.testing.assert_array_equal(whole.prompt, short.prompt)
    room = limit - len(whole.prompt) - 35
    for long, kept, flags in zip(
      whole.answers, short.answers, short.answer_targets
    ):
      np.testing.assert_array_equal(long[:room], kept)
      assert len(flags) == len(kept)
      assert (TOKENIZER.im_end in kept) == (len(long) <= room + 1)
  with pytest.raises(
    InputError, match="shorten its prompt, which is never cut"
  ):
    limited("truncate_answer", 40).example(0)
  same = dict(id="s", image=None, question="q", chosen="x y", rejected="x z")
  how = coder(long="truncate_answer")
  prompt = len(how.encode(same).prompt)
  with pytest.raises(coders.TooLongError, match="equal within max_length"):
    dataclasses.replace(how, max_length=prompt + 4).example(same)


# --- measuring ---------------------------------------------------------------


def test_processes_measure_what_one_does_and_a_table_is_kept(
  monkeypatch, tmp_path
):
  monkeypatch.setenv("PIVOT_JAX_CACHE", str(tmp_path))
  monkeypatch.setattr(lengths, "_FEW", 5)
  monkeypatch.setattr(lengths, "_CHUNK", 7)
  how = coder(max_length=lengths_of_all()[30])
  one, two = (
    lengths.measure(preference(), how, processes=n, key="k" * (n > 1))
    for n in (1, 2)
  )
  np.testing.assert_array_equal(one.sizes, two.sizes)
  assert one.long == two.long and len(one.long) and one.bad == two.bad == {}

  def refuse(*_):
    raise AssertionError("measured again")

  monkeypatch.setattr(lengths, "part", refuse)
  again = lengths.measure(preference(), how, key="k")
  np.testing.assert_array_equal(again.sizes, two.sizes)
  assert again.long == two.long
  with pytest.raises(AssertionError, match="measured again"):
    other = dataclasses.replace(how, mask="answer")
    lengths.measure(preference(), other, key="k", processes=1)


# --- SFT and DPO -------------------------------------------------------------


@pytest.mark.parametrize("long", ["drop", "truncate_answer"])
def test_both_objectives_leave_out_the_same_rows(tmp_path, long):
  """A rejected answer over the limit is one for SFT, which never sees it."""
  rows = [
    dict(
      id=str(i),
      image=None,
      question="q",
      chosen="yes",
      rejected="no " * (2 if i % 3 else 60),
    )
    for i in range(12)
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  spec = dict(kind="preference", path=str(path))
  sft, dpo = (
    opened(spec, coder(pairs=pairs, max_length=60, long=long))
    for pairs in (False, True)
  )
  assert sft.every() == dpo.every()
  assert len(sft.every()) == (8 if long == "drop" else 12)
  for one, other in zip(sft.examples(range(8)), dpo.examples(range(8))):
    assert one.id == other.id
    np.testing.assert_array_equal(one.answers[0], other.answers[0])


def test_a_void_row_needs_no_reference_and_a_seen_one_does(spec):
  seen = {
    e.id: ((-1.0, -2.0), coders.pair_crcs(e)[0])
    for e in opened(spec, max_bad=0.2).examples(range(12))
    if not e.void
  }
  found = streams.open_stream(
    [(spec | dict(max_bad=0.2), 1.0)], coder(), seed=0, reference=seen
  )
  void = [e for e in found.examples(range(12)) if e.void]
  assert len(void) == 2 and all(e.reference is None for e in void)
  # The image is there again: it was not scored.
  folder = pathlib.Path(spec["path"]).parent
  (folder / "gone.png").write_bytes((folder / "a.png").read_bytes())
  with pytest.raises(InputError, match="rows-8 has no reference"):
    list(found.examples(range(12)))


def test_a_share_of_bad_rows_is_each_source_s_own(spec):
  strict = spec | dict(max_bad=0.0)
  with pytest.raises(InputError, match=r"rows.jsonl:(4|9): "):
    found = streams.open_stream(
      [(strict, 1.0), (spec | dict(max_bad=0.9), 1.0)], coder(), seed=0
    )
    list(found.examples(range(24)))


def test_bad_texts_and_unreadable_images_are_counted_together(spec):
  path = pathlib.Path(spec["path"])
  lines = path.read_text().splitlines()
  lines[0] = lines[0].replace("yes", "no")
  path.write_text("\n".join(lines))
  found = opened(spec, max_bad=0.2)  # Two of twelve may be.
  with pytest.raises(InputError, match="3 of 12 rows are bad"):
    list(found.examples(range(11)))


def test_a_listed_line_that_is_no_record_is_left_out(spec, tmp_path):
  path = pathlib.Path(spec["path"])
  lines = path.read_text().splitlines()
  lines[5] = "{oops"
  path.write_text("\n".join(lines))
  bad = tmp_path / "bad.jsonl"
  faults = [dict(file=str(path), row=row) for row in (3, 5, 8)]
  bad.write_text("".join(json.dumps(one) + "\n" for one in faults))
  found = list(opened(spec, bad=str(bad)).examples(range(9)))
  assert len({example.id for example in found}) == 9


def test_a_batch_of_more_rows_than_there_are_is_refused():
  with pytest.raises(InputError, match="40 rows, fewer than batch=41: lower"):
    feed.choose_layout(
      stream(),
      coder(),
      pack=dict(tokens=0, losses=0),
      batch=41,
      steps=1,
      shards=1,
    )
