"""Over-optimization of a policy: where the reward still rises and what it stands for falls."""
