"""The paper's data, as entries of a config's `sources`.

  c.sources.chat = paper_data.mixture("onevision", root="datasets")
  c.sources.preference = paper_data.mmpr("data/under30", image_root="datasets")

The lists of files are in `configs/data/`; their heads say what is known of them.
An entry names its list as `package:configs/data/NAME.yaml`: the one that ships with
the package, wherever a run starts. Other paths are relative to where it starts.
"""

# The lists: paper.md 4.2, 4.3 and 4.4.
MIXTURES = ("llava_pretrain", "onevision", "cambrian")

# How many pairs the paper trains on.
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
    path=f"package:configs/data/{name}.yaml",
    root=root,
    image_root=image_root,
    strict=strict,
  )


def mmpr(
  folder: str,
  *,
  image_root: str = "datasets",
  size: int = 20_000,
  seed: int = 777,
  **choosing: str | float | None,
) -> dict:
  """Return the source of the pairs that `data select-mmpr` wrote.

  Args:
    folder: the one that it wrote.
    image_root: the folder that the images' paths begin in, as it said.
    size: of the set.
    seed: of its order.
    choosing: refused; a config chooses no rows.
  """
  if choosing:
    raise ValueError(
      f"paper_data.mmpr: {sorted(choosing)[0]}: a config does not choose rows;"
      " write the set once, `python -m pivot_jax.data select-mmpr META"
      " --set=NAME --tokenizer=ADDRESS --to=DIR`, and give DIR"
    )
  return dict(
    kind="preference",
    path=f"{folder}/dpo_mmpr_{size}_{seed}.json",
    image_root=image_root,
  )
