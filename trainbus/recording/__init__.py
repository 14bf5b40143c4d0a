"""Turns events into the records of a run; no error in it reaches the training."""
