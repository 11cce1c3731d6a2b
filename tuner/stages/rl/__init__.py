"""Reinforcement learning of a policy: one loop for PPO, GRPO and RLOO."""
