"""Config of what a policy run does when its figures show that it goes wrong."""

from typing import Literal, get_args

from tuner.config.base import ConfigBase

Action = Literal["warn", "stop", "roll_back"]
"""What an alarm does: it is logged; the run also ends after the step; or its model also becomes that of the last
checkpoint at which no sign had begun."""
ACTIONS: tuple[Action, ...] = get_args(Action)
"""From the one that does least to the one that does most."""


class Alarms(ConfigBase):
    """What each sign does when it first speaks: "warn" (it is logged), "stop" (the run also ends after that step), or
    "roll_back" (its model also becomes that of the last checkpoint at which no sign had begun)."""

    exploits: Action = "warn"
    """The answers that score best are wrong by the gold rule (`gold_top_tenth`), or the score no longer tells right
    answers from wrong ones (`gold_auc`), so the policy exploits the reward; needs evaluation.rule on rollouts."""

    kl: Action = "warn"
    """The KL divergence from the reference exceeds 1 nat per token (`max_kl` stops at a limit of your own). GRPO and
    RLOO hold a reference for it, unless it only warns."""

    ended: Action = "warn"
    """Few answers end within max_new_tokens, where most did before."""
