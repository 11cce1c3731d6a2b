"""Algorithms: rewards, advantages and losses of a rollout. One file each."""
