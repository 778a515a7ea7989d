"""Data: from files to the placed updates that a training reads.

In reading order:
  rows         rows, the `Source` protocol, and views of sources
  sources/     the readers of files; scenes/ makes rows without any
  opener       an entry of a config, or a path, to a source
  grouping     preference pairs that share image and question, as one row
  tokenizer    words to tokens; chat: conversations and pairs to tokens
  framing      squares; wholeness: damage to files; images: files to pixels
  coders       rows to examples, the limit of tokens included
  lengths      the size of every row, measured once
  layouts      sizes of rows that fit a run; packing: examples to batches
  streams      the seeded order of examples
  feed         placed updates; the only module here that imports jax
  tools/       the commands of `python -m pivot_jax.data`

Nothing before `feed` loads jax, grain, pyarrow, array_record or transformers
when it is imported, so that a process which measures texts stays small.
"""
