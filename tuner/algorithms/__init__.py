"""Algorithms: what turns a rollout into losses. One file each."""
