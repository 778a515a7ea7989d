"""Training of an MLLM, in reading order.

`losses` and `objectives` turn arrays, then a model, into a loss; `train_state`,
`train_step` and `loop` are the state, one jitted update and the loop around it;
`optimizer` has the rules of rates and decay. `starting_model` assembles the
parts of a model, `reference_logps` reads DPO's reference. `recorder` writes
metrics and checkpoints; `monitor` measures rates; `cost` says beforehand how
many operations and bytes an update takes.
"""
