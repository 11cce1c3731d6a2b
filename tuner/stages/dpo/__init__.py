"""Direct preference optimization, by TRL: the alternative to a reward model and reinforcement learning."""

from tuner.stages.dpo.stage import DPOStage

STAGE = DPOStage()
