"""Config of COOL RLHF: rounds of patching the reward model, training the policy, and having its answers judged."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.base import ConfigBase
from tuner.config.feedback_config import Feedback, People
from tuner.config.grpo_config import GRPO
from tuner.config.ppo_config import PPO
from tuner.config.reward_config import RewardModel
from tuner.config.rloo_config import RLOO
from tuner.config.stage_config import StageConfig
from tuner.config.training import Checkpoint

Share = Annotated[float, Field(gt=0, lt=1)]


class Patch(ConfigBase):
    """How a reward model learns from the labels of all rounds so far, and what that may cost it."""

    start: Literal["continue", "restart"] = "continue"
    """What is trained: the reward model of the round before, or again the one that `reward.model` names. The report
    does not say which one InternLM2 did."""

    original: float = Field(default=3.0, ge=0)
    """Original preference rows (of `reward.data`) per label that are trained on as well, drawn at random: what was
    learned from them stays."""

    contradicting: Literal["leave_out", "draw"] = "leave_out"
    """What becomes of original rows that prefer a pattern which the labels reject (of at least 5 labels that tell, 80%
    prefer the answer without it): they are counted and left out, or drawn like the others and teach it again."""

    weight: float = Field(default=1.0, gt=0)
    """Factor on the loss weight of a label; an original pair has 1."""

    steps: int | None = Field(default=None, ge=1)
    """Maximum number of optimizer steps; None: set by `epochs`."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the labels and the original rows drawn."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; None: that of `reward.optimizer`."""

    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of the labels, by prompt, that no round trains on: they measure every pattern before and after."""

    average: tuple[Share, ...] = ()
    """Shares of the patched weights in averages with those before the patch (WARM, arXiv 2401.12187). Of these and the
    patched model itself, the round takes the one that is right on most held-out labels within the limits below; none:
    the patched model."""

    max_accuracy_loss: float = Field(default=0.01, ge=0, le=1)
    """Accuracy on the original held-out rows that a patch may cost."""

    min_margin: float | None = Field(default=0.5, ge=0, le=1)
    """Fraction of each condition's mean margin on the original held-out rows that a patch must keep: rows with large
    margins stay right long after what tells them apart has begun to fade. None: any."""

    on_loss: Literal["stop", "roll_back"] = "stop"
    """What follows a patch beyond these limits: the run stops and says so, or goes on with the reward model of the
    round before."""


class Round(ConfigBase):
    """A round: a patched reward model, a policy trained against it, and pairs of its answers to be labeled."""

    steps: int | None = Field(default=None, ge=1)
    """Steps of the policy; None: as `policy` says."""

    start: Literal["restart", "continue"] = "restart"
    """The policy the round trains: again `policy.policy`, or that of the round before. KL is measured from
    `policy.policy` (or `policy.reference`) either way. The report does not say which one InternLM2 did."""

    patch: Patch = Patch()
    """How the reward model is patched before the policy is trained."""


class Candidates(ConfigBase):
    """Pairs of answers that are labeled after a round (arXiv 2403.17297, 4.2.2)."""

    prompts: int = Field(default=256, ge=1)
    """Training prompts, drawn at random, that the policies answer: the starting one, the milestones (see
    `checkpoint.milestones`) and the round's last."""

    answers: int = Field(default=1, ge=1)
    """Answers of each policy to a prompt."""

    slow: int = Field(default=200, ge=0)
    """Maximum number of pairs from different policies, which raise what the reward model can tell apart (the slow
    path); 0: none."""

    fast: int = Field(default=100, ge=0)
    """Maximum number of pairs of each hacking pattern, a sign that answers with the best scores carry and earlier
    answers do not (the fast path; the report has 20 to 100); 0: none."""

    patterns: int = Field(default=3, ge=1)
    """Maximum number of patterns that are looked for."""

    minimal: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Fraction of a pattern's pairs that are the same answer with and without it."""


class COOL(StageConfig):
    """Conditional online RLHF (COOL RLHF) in rounds, with feedback on the policy's own answers.

    Each round patches the reward model with all labels so far, trains a policy against it, and has pairs of answers
    labeled. The rounds' folders in the run's folder (round_1/reward, round_1/ppo, ...) are runs of their own.
    """

    implementation: ClassVar[str] = "tuner.stages.cool.stage"

    stage: Literal["cool"] = "cool"
    """Name of the stage, in JSON."""

    reward: RewardModel
    """How a round's reward model is trained, and its original preferences; the first is `policy.reward`."""

    policy: Annotated[PPO | GRPO | RLOO, Field(discriminator="stage")]
    """How a round's policy is trained."""

    rounds: tuple[Round, ...] = Field(default=(Round(), Round(), Round()), min_length=1)
    """The rounds. More of them make a finished run longer."""

    candidates: Candidates = Candidates()
    """Which pairs of answers are labeled."""

    feedback: tuple[Feedback, ...] = Field(min_length=1)
    """Who labels them: People(), Judge(url=...), or rules. Every one labels all pairs; people outrank the others."""

    max_steps: int | None = Field(default=None, ge=1)
    """Maximum number of steps of the policies of all rounds together: later rounds are shortened or left out; None: no
    limit."""

    seed: int = Field(default=0, ge=0)
    """Random seed of the pairs and rows drawn; also added to the seeds of `reward` and `policy`."""

    checkpoint: Checkpoint = Checkpoint(every=20, milestones={"early": 0.25, "middle": 0.5})
    """Checkpoints of the rounds' runs, in place of those of `reward` and `policy`. The milestones are the policies
    whose answers are compared with those of the first and the last."""

    merge: bool = True
    """Write the last policy, if it is an adapter, also as a model of its own, in the folder `merged`."""

    @model_validator(mode="after")
    def _a_model_scores(self) -> Self:
        if self.policy.reward_model is None:
            raise ValueError(
                "policy.reward is a rule, and rounds patch a reward model: name the run of one, or train the policy "
                "alone"
            )
        return self

    @model_validator(mode="after")
    def _labelers_differ(self) -> Self:
        names = ["people" if isinstance(part, People) else part.annotator for part in self.feedback]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"feedback: {twice} comes twice, and labels each pair once: leave one out, or give it a name of its own"
            )
        return self

    @model_validator(mode="after")
    def _reward_models_can_disagree(self) -> Self:
        orders = [part.order for part in self.feedback if isinstance(part, People)]
        if "disagreement" in orders and not self.policy.further_rewards:
            raise ValueError(
                'feedback: People(order="disagreement") needs several reward models, and policy has one: name others '
                "in policy.further_rewards, or choose another order"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_of_something(self) -> Self:
        if len(self.rounds) > 1 and not self.candidates.slow and not self.candidates.fast:
            raise ValueError(
                "candidates: slow and fast are both 0, so later rounds have no labels: raise one"
            )
        return self

    @model_validator(mode="after")
    def _averages_have_the_same_weights(self) -> Self:
        for number, settings in enumerate(self.rounds, 1):
            if settings.patch.average and settings.patch.start == "restart":
                raise ValueError(
                    f"round {number}: patch.average needs weights that were trained from those before the patch: "
                    'write patch.start="continue", or leave average out'
                )
        return self
