"""The conditional reward model."""

from tuner.stages.reward.stage import RewardStage

STAGE = RewardStage()
