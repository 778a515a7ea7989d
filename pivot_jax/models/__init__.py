"""The models, in reading order: each file works on one device's arrays.

`bounds` checks the numbers of a configuration, `layers` and `attention` are the blocks' parts, `sequences` says where the tokens
of packed rows lie; `vit` is the vision encoder, `qwen2` the language model,
`heads` the projector and the probe's head, `mllm` all of it together.
"""
