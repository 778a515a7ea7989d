"""Settings that differ are named one by one, each in short."""

import pytest

from pivot_jax.recipe import settings


def arms(**labels):
  return {
    "arms": [
      dict(name=name, model=f"stage_{name}", label=label)
      for name, label in labels.items()
    ]
  }


@pytest.mark.parametrize("before, now, said", [
  (dict(a=1), dict(a=2), "a: 1 -> 2"),
  (dict(a=dict(b=1)), dict(a=dict(b=1, c=2)), "a.c: None -> 2"),
  (arms(dpo="a", sft="s"), arms(dpo="b", sft="s"), "arms.dpo.label: 'a' -> 'b'"),
  (arms(dpo="a", sft="s"), arms(sft="s", dpo="a"),
   "arms: ['dpo', 'sft'] -> ['sft', 'dpo']"),
  (arms(dpo="a"), arms(), "arms: ['dpo'] -> []; arms.dpo.label: 'a' -> None; "
   "arms.dpo.model: 'stage_dpo' -> None; arms.dpo.name: 'dpo' -> None"),
  (dict(pairs=[dict(one="a"), dict(one="b")]),
   dict(pairs=[dict(one="a"), dict(one="c")]), "pairs.1.one: 'b' -> 'c'"),
  (dict(one=[dict(x=1)]), dict(one=[dict(x=2)]), "one.0.x: 1 -> 2"),
  (dict(twice=[dict(name="a", x=1), dict(name="a", x=2)]),
   dict(twice=[dict(name="a", x=3), dict(name="a", x=2)]), "twice.0.x: 1 -> 3"),
  (dict(lr=[[".*", 0.1]]), dict(lr=((".*", 0.2),)),
   "lr: [['.*', 0.1]] -> [['.*', 0.2]]"),
  (dict(a=[]), dict(a=None), "a: [] -> None"),
  (arms(dpo="a"), arms(dpo="a"), ""),
], ids=str)  # fmt: skip
def test_a_difference_names_the_field_that_changed(before, now, said):
  assert settings.difference(before, now, ()) == said


def test_each_difference_is_short_and_there_are_four():
  before = {name: name * 200 for name in "abcdef"}
  said = settings.difference(before, dict(before, f="f"), ())
  assert said.startswith("f: 'ffff") and said.endswith("...' -> 'f'")
  assert len(said) < 100
  said = settings.difference(before, dict.fromkeys(before), ())
  assert said.count(" -> None") == 4 and said.endswith(" ...")


def test_free_settings_do_not_count():
  before, now = dict(a=1, b=dict(a=1, c=1)), dict(a=2, b=dict(a=2, c=1))
  assert settings.difference(before, now, ("a",)) == ""
