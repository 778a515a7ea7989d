"""The paper's data, as entries of a config's `sources`.

  c.sources.chat = paper_data.mixture("onevision", root="datasets")
  c.sources.preference = paper_data.mmpr(
    "datasets/MMPR-v1.2/meta.json", tokenizer="weights/qwen", name="under30"
  )

The lists of files are in `configs/data/`; their heads say what is known of them.
Paths are relative to where a run starts: the repository's root, for the lists.
"""

# The lists: paper.md 4.2, 4.3 and 4.4.
MIXTURES = ("llava_pretrain", "onevision", "cambrian")

# What is asked of the chosen answers in each set of 20,000 pairs: paper.md 4.5
# to 4.7. `new` are over 100 words or think aloud.
MMPR = dict(
  origin=dict(),
  new_0=dict(new_fraction=0.0),
  new_50=dict(new_fraction=0.5),
  new_80=dict(new_fraction=0.8),
  under30=dict(only="under30"),
  nothink=dict(only="nothink"),
)
# How many pairs the paper trains on. A larger set holds the smaller ones of its
# name, and begins with them unless it has a share of new answers.
SIZES = (
  3_000,
  5_000,
  10_000,
  20_000,
  40_000,
  60_000,
  80_000,
  100_000,
  150_000,
)


def mixture(
  name: str, *, root: str, image_root: str = "", strict: bool = True
) -> dict:
  """Return the source of one of `MIXTURES`.

  Args:
    root: the folder that the list's paths begin in.
    image_root: where the images' paths begin; "": in `root`.
    strict: whether files of another length than known are an error.
  """
  if name not in MIXTURES:
    raise ValueError(f"mixture {name!r}: choose one of {MIXTURES}")
  return dict(
    kind="mixture",
    path=f"configs/data/{name}.yaml",
    root=root,
    image_root=image_root,
    strict=strict,
  )


def mmpr(
  path: str,
  *,
  tokenizer: str,
  name: str = "origin",
  selection: str = "official",
  size: int = 20_000,
  seed: int = 777,
  image_root: str = "",
) -> dict:
  """Return the source of one of the sets `MMPR`.

  Args:
    path: MMPR's `meta.json`.
    tokenizer: the folder of Qwen2.5's, which measures answers.
    selection: "official", as the released script is said to choose, or "fixed".
    image_root: the folder of the images' folders; "": as `meta.json` lies.
  """
  if name not in MMPR:
    raise ValueError(f"set {name!r}: choose one of {sorted(MMPR)}")
  return dict(
    kind="mmpr",
    path=path,
    image_root=image_root,
    tokenizer=tokenizer,
    selection=selection,
    size=size,
    seed=seed,
    **dict(new_fraction=None, only="") | MMPR[name],
  )
