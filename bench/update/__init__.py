"""An update of a toy MLLM, ours and the peers'.

In reading order: `toy.py` holds the model and its data, `ours.py` the package's
update, `ladder.py` the rungs from the peers' algorithm to it, `torch_peer.py`
and `trl_peer.py` the other side, `peers.py` their settings.
"""
