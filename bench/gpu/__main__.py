"""One GPU: a smoke test, and an update of real size beside TRL and torch.

  python -m bench.gpu smoke      # six minutes at most, no peer, no network
  python -m bench.gpu status     # what the last smoke test found, in a line
  python -m bench.gpu            # beside TRL and torch, at most ten minutes
  python -m bench.gpu --tiny     # the same code in a minute or two, CPU or GPU

The last two need `pip install -e ".[bench]"` with a CUDA build of jax, and torch
for CUDA. SigLIP2-So400m at 384 pixels and Qwen2.5-1.5B with random weights,
bfloat16 products, float32 parameters and AdamW, and pairs of 667 prompt, 280
and 309 answer tokens. Both sides first give the same numbers for a small model
with equal weights. Rows come in the order of their importance
(`bench/gpu/rows.py`); one that does not fit or takes too long is a result, and
where the time is over the rest is "not run": --minutes=30 gives more of it, and
--only=ROW,ROW --name=gpu_2 runs some of them another time.
"""

import sys

from bench import harness, results
from bench.gpu import rows

_ANYWHERE = ("--tiny", "--help", "-h", "--setup", "--variant")


def main() -> None:
  """Run the smoke test, print its status, or run the benchmark."""
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word in ("smoke", "status"):
    from bench.gpu import smoke

    sys.exit({"smoke": smoke.main, "status": smoke.show}[word](sys.argv[2:]))
  anywhere = any(flag.startswith(_ANYWHERE) for flag in sys.argv[1:])
  if not (anywhere or results.gpu()):
    sys.exit("gpu: there is no NVIDIA GPU here; --tiny runs on a CPU")
  harness.main(rows.BENCH)


if __name__ == "__main__":
  main()
