"""Events become the records of a run; nothing that goes wrong here reaches the training."""
