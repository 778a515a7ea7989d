"""Published formats of weights, in and out, tensor by tensor.

In reading order: `names` (parameter paths to tensor names), `layouts` (the same
tensors in other projects' files), `safetensor_files` (folders of them), `towers`
(what the families of vision encoders share), `open_weights` (checked before any
is read), then one module a format: `hf` with `hf_config`, `processor` and
`llava`, `timm`, `big_vision`. `positions` resizes a table to another grid.
"""
