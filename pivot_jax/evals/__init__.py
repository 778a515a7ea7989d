"""Numbers from frozen models, arrays and texts, in reading order.

`generate` decodes answers; `question_only` is the baseline that sees no image.
`features` reads frozen features of a source; `logistic` and `segmentation` are
the numerics of the two probes on them. `gradients` maps the losses' gradients.
"""
