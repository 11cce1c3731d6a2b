"""Supervised fine-tuning, and continued pre-training: the same loop over other rows."""

from tuner.stages.sft.stage import SFTStage

STAGE = SFTStage()
