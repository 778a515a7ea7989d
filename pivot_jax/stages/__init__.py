"""The stages of a recipe: one file is one kind, none imports another.

Each has run(config, inputs, out) -> metrics: it unpacks its config, reads its
inputs and writes one folder. In the order in which a recipe runs them: `train`,
`score`, `detach`, `linear_probe`, `segment_probe`, `gradcam`, `evaluate`,
`report`.
"""
