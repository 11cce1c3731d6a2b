"""Direct preference optimization, by TRL."""
