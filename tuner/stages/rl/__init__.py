"""Reinforcement learning of a policy: one loop, whatever the algorithm."""

from tuner.stages.rl.stage import RLStage

STAGE = RLStage()
