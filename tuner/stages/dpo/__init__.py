"""Direct preference optimization, by TRL: the alternative to a reward model and reinforcement learning."""
