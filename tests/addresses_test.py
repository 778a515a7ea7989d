"""Addresses: their parts, their choices, and models of the hub."""

import os
import subprocess
import sys

import pytest

from pivot_jax import addresses
from pivot_jax.errors import InputError


@pytest.mark.parametrize(
  "address, wanted",
  [
    ("out/a", ("dir", "out/a", "")),
    ("out/a:vision", ("dir", "out/a", "vision")),
    ("hf:x:llm", ("hf", "x", "llm")),
    ("bv:a/b.npz:vision", ("bv", "a/b.npz", "vision")),
    ("timm:a.safetensors", ("timm", "a.safetensors", "")),
  ],
)
def test_addresses_are_parsed(address, wanted):
  found = addresses.parse(address)
  assert (found.kind, str(found.path), found.part) == wanted
  assert found.options == {}


def test_a_packaged_address_is_inside_the_package():
  found = addresses.parse("package:toy:vision")
  assert (found.kind, found.part) == ("package", "vision")
  assert found.path.parts[-3:] == ("pivot_jax", "assets", "toy")


def test_the_tower_inside_an_npz_file_is_no_part_of_the_model():
  found = addresses.parse("bv:/a/b.npz:img")
  assert (found.part, found.inside) == ("", "img")
  assert found.origin == "bv:/a/b.npz:img"


def test_choices_stand_behind_a_question_mark():
  found = addresses.parse(
    "hf:x:vision?image_size=378&positions=dinov2&final_norm=false"
  )
  assert (str(found.path), found.part) == ("x", "vision")
  assert found.options == {
    "image_size": 378,
    "positions": "dinov2",
    "final_norm": False,
  }


def test_an_origin_is_found_from_elsewhere_and_read_to_the_same_layer(tmp_path):
  given = f"hf:{tmp_path}:vision?feature_layer=-3&final_norm=true&tokens=4"
  origin = addresses.parse(given).origin
  assert origin == f"hf:{tmp_path}?feature_layer=-3&final_norm=true"
  again = addresses.parse(origin)
  assert again.options == {"feature_layer": -3, "final_norm": True}


@pytest.mark.parametrize("address", ["", ":vision", "hf:", "bv:", "timm:?a=1"])
def test_addresses_of_nothing_are_refused(address):
  with pytest.raises(InputError):
    addresses.parse(address)


@pytest.mark.parametrize(
  "address, said",
  [
    ("hf:x?size=3", "unknown choice 'size'"),
    ("hf:x?image_size=big", "image_size='big': give a whole number"),
    ("hf:x?tokens=9&tokens=4", "tokens is given twice"),
    ("out?image_size=3", "choices after . are for published weights"),
  ],
)
def test_wrong_choices_are_refused(address, said):
  with pytest.raises(InputError, match=said):
    addresses.parse(address)


def test_an_address_is_there_or_is_one_of_the_hub(tmp_path):
  (tmp_path / "x.npz").touch()
  for address in (
    *(str(tmp_path), f"hf:{tmp_path}:vision", f"bv:{tmp_path}/x.npz:img"),
    *("package:toy/stage1", "hf:org/name?image_size=3"),
  ):
    assert addresses.is_there(address)
  for address in ("", "stage2_dop", "hf:gone", "org/name", "package:tyo"):
    assert not addresses.is_there(address)


def _cache(folder):
  """A cached model, as huggingface_hub lays it out."""
  model = folder / "hub" / "models--someone--tiny"
  snapshot = model / "snapshots" / "abc123"
  snapshot.mkdir(parents=True)
  (model / "refs").mkdir()
  (model / "refs" / "main").write_text("abc123")
  (snapshot / "config.json").write_text("{}")
  return snapshot


def _parse_offline(address, home):
  # In a process of its own: the hub's settings are read when it is imported.
  script = (
    "from pivot_jax import addresses;"
    f"found = addresses.parse({address!r}); print(found.path, found.origin)"
  )
  return subprocess.run(
    [sys.executable, "-c", script],
    env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def test_a_cached_model_of_the_hub_is_found_offline(tmp_path):
  snapshot = _cache(tmp_path)
  done = _parse_offline("hf:someone/tiny:vision", tmp_path)
  origin = "hf:someone/tiny?revision=abc123"
  assert done.stdout.split() == [str(snapshot), origin], done.stderr


def test_a_model_that_is_not_cached_is_refused_offline(tmp_path):
  done = _parse_offline("hf:someone/other", tmp_path)
  assert done.returncode != 0
  assert "hf:someone/other: no such folder" in done.stderr
  assert "hf download someone/other" in done.stderr
