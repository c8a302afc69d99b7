"""Annotators: who says which of several responses is better. See `base.py` for the protocol."""
