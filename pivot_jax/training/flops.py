"""How much arithmetic an update needs at least: what MFU is measured against.

Matrix products alone, a multiplication and an addition being two operations:
forward, then the gradient of what they read and, where it trains, of the
weights. An image is encoded once, a prompt decoded once, the head
reads the positions of the loss; padding, recomputation and copies count
nothing, so that a path which does more than it has to shows a lower MFU.
"""

import dataclasses
import re
from collections.abc import Sequence

from pivot_jax.data import packing
from pivot_jax.models import mllm, qwen2, vit

# Peak of bfloat16 matrix products, without sparsity, in operations a second:
# the makers' data sheets. The first name among a device's kind's words counts.
PEAKS: tuple[tuple[str, float], ...] = (
  ("H100 PCIe", 756e12),
  ("H100 NVL", 835e12),
  ("H200 NVL", 835e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("GH200", 989e12),
  ("B200", 2250e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L40", 181e12),
  ("L4", 121e12),
  ("T4", 65e12),
  ("TPU v6 lite", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5p", 459e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


def update(
  model: mllm.MLLM, trainable: Sequence[str], work: packing.Work
) -> dict[str, int]:
  """Return the operations of an update by part: vision, projector, llm, head.

  `trainable` holds the paths of the parameters that train. A part has a backward
  pass if anything in it or before it trains.
  """
  found: dict[str, int] = {}
  before = False
  for name, part in _parts(model, work).items():
    trained = [
      path
      for path in trainable
      if path.startswith(f"{name}/") and not path.startswith(_BEHIND)
    ]
    first = not before
    before = before or bool(trained)
    found[name] = part.forward * (2 if before else 1)
    if before and first:
      # What the first part that trains reads needs no gradient.
      found[name] -= part.input
    found[name] += part.attention * (3 if before else 1)
    found[name] += sum(part.kernels.get(path, 0) for path in trained)
  if model.llm is not None:
    norm = any(path.startswith("llm/norm/") for path in trainable)
    found["head"] = _head(model.llm, trainable, work, before or norm)
  return found


# Parameters behind the blocks, which need no gradient because of them.
_BEHIND = ("llm/norm/", "llm/lm_head/")


@dataclasses.dataclass(frozen=True)
class _Part:
  """Forward operations: of each kernel by path, and of attention.

  input: of a kernel that reads nothing but the part's own input.
  """

  kernels: dict[str, int]
  attention: int = 0
  input: int = 0

  @property
  def forward(self) -> int:
    return sum(self.kernels.values())


def _parts(model: mllm.MLLM, work: packing.Work) -> dict[str, _Part]:
  """Return the parts in the order in which an update goes through them."""
  found = {}
  if model.vision is not None:
    found["vision"] = _vision(model.vision, work.images)
  if model.vision is not None and model.llm is not None:
    features = work.images * model.vision.num_patches
    wide, narrow = model.vision.hidden_size, model.llm.hidden_size
    found["projector"] = _Part(
      {
        "projector/linear_1/kernel": 2 * features * wide * narrow,
        "projector/linear_2/kernel": 2 * features * narrow**2,
      },
      input=2 * features * wide * narrow,
    )
  if model.llm is not None:
    found["llm"] = _llm(model.llm, work)
  return found


def _vision(config: vit.VisionConfig, images: int) -> _Part:
  width, inner = config.hidden_size, config.intermediate_size
  tokens = images * config.positions
  layers = config.used_layers
  patch = 2 * images * config.grid**2 * config.patch_size**2 * 3 * width
  blocks = "vision/encoder/layers"
  attended = {
    f"{blocks}/self_attn/{name}/kernel": 2 * layers * tokens * width**2
    for name in ("q_proj", "k_proj", "v_proj", "out_proj")
  }
  mlp = ("fc1", "fc2")
  if config.gated_mlp:
    mlp = ("gate_proj", "up_proj", "down_proj")
  perceived = {
    f"{blocks}/mlp/{name}/kernel": 2 * layers * tokens * width * inner
    for name in mlp
  }
  return _Part(
    {"vision/embeddings/patch_embedding/kernel": patch} | attended | perceived,
    attention=4 * layers * tokens * config.positions * width,
    input=patch,
  )


def _llm(config: qwen2.LLMConfig, work: packing.Work) -> _Part:
  width, layers = config.hidden_size, config.num_hidden_layers
  queries = config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  sizes = {
    "self_attn/q_proj": width * queries,
    "self_attn/k_proj": width * keys,
    "self_attn/v_proj": width * keys,
    "self_attn/o_proj": queries * width,
    "mlp/gate_proj": width * config.intermediate_size,
    "mlp/up_proj": width * config.intermediate_size,
    "mlp/down_proj": width * config.intermediate_size,
  }
  return _Part(
    {
      f"llm/layers/{name}/kernel": 2 * layers * work.tokens * size
      for name, size in sizes.items()
    },
    attention=4 * layers * work.pairs * queries,
  )


def _head(config, trainable, work, backward) -> int:
  name = "embed_tokens/embedding"
  if not config.tie_word_embeddings:
    name = "lm_head/kernel"
  forward = 2 * work.targets * config.hidden_size * config.vocab_size
  trains = f"llm/{name}" in trainable
  return forward * (1 + (backward or trains) + trains)


def peak(kind: str, devices: int) -> float | None:
  """Return the bfloat16 peak of all devices, None for a kind not known."""
  # A slice of a GPU has a share of its peak that the name does not say.
  if "MIG" in kind:
    return None
  known = [flops for name, flops in PEAKS if re.search(rf"\b{name}\b", kind)]
  return known[0] * devices if known else None
