"""Training: the loop and its steps, updates of weights, checkpoints, run folders, devices, and the door to TRL."""
