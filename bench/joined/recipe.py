"""A recipe of one training, for runs of several processes.

recipe.py            an LLM of seven million parameters, from a random start
recipe.py:quick      a model of under 50,000 parameters
recipe.py:from=DIR   of an artifact; `quick,from=DIR` likewise
"""

from pivot_jax.configs import common, pivot

_QUICK = dict(
  vision=dict(
    image_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
  ),
  llm=dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
  ),
)
_LARGER = dict(
  vision=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4),
  llm=dict(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
  ),
)
_LARGE = dict(
  _LARGER,
  llm=dict(
    _LARGER["llm"],
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=16,
    head_dim=64,
  ),
)
_NAMED = {"quick": _QUICK, "large": _LARGE}


def get_config(name: str = "") -> common.ConfigDict:
  """Return the recipe; see above for its names."""
  c = pivot.get_config("debug")
  size, _, start = name.partition("from=")
  size = size.rstrip(",")
  for part, sizes in _NAMED.get(size, _LARGER).items():
    c[part].update(dict(init="") | sizes)
  c.trained = common.stage(
    "train",
    inputs=dict(init=start) if start else {},
    data=(("chat", 1.0),),
    # What is large is read, and has no moments.
    trainable=("projector/.*",) if size == "large" else (".*",),
    batch=16,
    # More than any benchmark waits for.
    steps=200,
    lr=((".*", 1e-3),),
    save_every=5,
    pack=dict(row=256),
  )
  c.arms, c.compared = (), ()
  c.order = ("trained",)
  return c
