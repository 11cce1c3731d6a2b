"""Reinforcement learning of a policy: one loop, whatever the algorithm."""
