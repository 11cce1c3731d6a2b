"""The rows of a config, without a model: to be looked at, checked, and compared on."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tuner.config import DPO, PPO, SFT, Model, PackedConfig, RewardModel, SingleModelConfig, StageConfig
from tuner.data.batch import pack_all
from tuner.data.comparisons import Comparisons
from tuner.data.conditions import Conditions, read_conditions
from tuner.data.dataset import Dataset, Progress, load_data
from tuner.data.examples import Examples
from tuner.data.inspection import Label
from tuner.data.load_pairs import load_pairs
from tuner.data.load_preferences import load_preferences
from tuner.data.load_prompts import RewardReader, load_prompts
from tuner.data.prompt_stream import PromptStream, plan_prompts
from tuner.data.prompts import PromptSet
from tuner.data.stream import Stream, make_stream
from tuner.display.data_page import data_html
from tuner.errors import UserError
from tuner.models.load import load_tokenizer
from tuner.models.locate import locate
from tuner.models.reward_record import known_conditions
from tuner.models.scorer import reward_template
from tuner.training.run_folder import Run, functions_of


def load_rows(
    config: StageConfig, tokenizer: Any = None, *, progress: Progress | None = None
) -> Dataset[Any]:
    """The samples of a config's data, or the rows of answers that are compared.

    tokenizer: its model's, where it is loaded already. Raises UserError as loading them does.
    """
    tokenizer = load_tokenizer(model_of(config)) if tokenizer is None else tokenizer
    if isinstance(config, PPO):
        return load_prompts(config.prompts, tokenizer, reward_reader(config), progress=progress)
    config = config if isinstance(config, DPO) else packed(config)
    if isinstance(config, DPO):
        return load_pairs(config.data, tokenizer, progress=progress)
    if isinstance(config, RewardModel):
        conditions = Conditions(read_conditions(config.conditions), config.seed)
        return load_preferences(config.data, tokenizer, conditions, config.reward_token, progress=progress)
    assert isinstance(config, SFT)
    return load_data(config.data, tokenizer, progress=progress)


def model_of(config: StageConfig) -> Model:
    """The model whose tokenizer the rows of a config are made with."""
    if isinstance(config, PPO):
        return config.policy
    return config.model if isinstance(config, SingleModelConfig) else packed(config).model


def reward_reader(config: PPO) -> RewardReader | None:
    """What a config's reward model can be asked; None where it is not there yet, so that nothing can be checked."""
    if not Path(config.reward.path).is_dir():
        return None
    location = locate(config.reward, weights=False)
    _, template = reward_template(config.reward, location)
    return RewardReader(tuple(known_conditions(location.folder)), template)


def packed(config: StageConfig) -> PackedConfig:
    """The config as one of a stage that trains on packed rows; UserError for others."""
    if not isinstance(config, PackedConfig):
        raise UserError(
            f"{config.name}: a {type(config).__name__} stage does not pack its rows, so there are none to show"
        )
    return config


def plan(config: StageConfig, data: Dataset[Any]) -> Stream:
    """The steps a config makes of its samples. Raises UserError for a row that is longer than a pass."""
    config = packed(config)
    lengths = data.train.lengths
    if len(lengths) and lengths.max() > config.tokens_per_pass:
        longest = int(lengths.argmax())
        raise UserError(
            f"{data.train.origin(longest)}: its answers are {lengths[longest]:,} tokens together, more than "
            f"tokens_per_pass ({config.tokens_per_pass:,}), and a row is never split; raise it, or shorten the list"
        )
    return make_stream(
        data.train,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pass=config.tokens_per_pass,
        epochs=config.epochs,
        seed=config.seed,
        sources=config.data.sources,
    )


def plan_run(config: PPO, prompts: Dataset[PromptSet]) -> PromptStream:
    """Which prompts each step of a config answers. Raises UserError where a rule has no prompt to measure."""
    if config.evaluation.rule is not None and prompts.test is None:
        raise UserError(
            f"evaluation.rule: no prompt is held out for it to measure ({prompts.report}); give prompts.test_files, or "
            "a larger prompts.split.test, or leave the rule out"
        )
    return plan_prompts(
        prompts.train,
        prompts_per_step=config.prompts_per_step,
        epochs=config.epochs,
        seed=config.seed,
        sources=config.prompts.sources,
    )


def all_warm_up(config: PPO, steps: int) -> list[str]:
    """What is to be said of a run whose policy never learns: one sentence, or none."""
    if steps > config.critic_warmup:
        return []
    return [
        f"all {steps:,} steps are the critic's warm-up (critic_warmup={config.critic_warmup}): the policy "
        "learns nothing; lower it, or give more steps"
    ]


@dataclass(frozen=True)
class DataPage:
    """The tokens a config learns from, as a page of HTML that stands alone; in Jupyter it is shown."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        """In a frame of its own: its style must not reach the notebook's."""
        frame = "width:100%;height:720px;border:1px solid rgba(128,128,128,.3);border-radius:8px"
        return f'<iframe sandbox style="{frame}" srcdoc="{escape(self.html)}"></iframe>'


def view_data(config: StageConfig, passes: int = 1) -> DataPage:
    """Look at the tokens of a config's first passes, at statistics, and at what is wrong with the rows."""
    rows, tokenizer = load_rows(config), load_tokenizer(model_of(config))
    samples, shown, label = shown_passes(config, rows, passes)
    page = data_html(samples, tokenizer, shown, rows.report, title=config.name or "data", label=label)
    return DataPage(page)


def shown_passes(
    config: StageConfig, rows: Dataset[Any], passes: int
) -> tuple[Examples, list[list[int]], Label]:
    """Samples, those of the first passes, and what each is; of rows of answers, every answer is one.

    Of prompts those of the first step, as they would be packed without their answers.
    """
    if isinstance(config, PPO):
        chosen = plan_run(config, rows).step(0)
        groups = pack_all(rows.train.lengths[chosen], config.tokens_per_pass)[:passes]
        shown = [chosen[group].tolist() for group in groups]
        return rows.train.examples(), shown, lambda index: rows.train.condition(index) or ""
    shown = plan(config, rows).passes(0)[:passes]
    if isinstance(rows.train, Comparisons):
        return rows.train.sequences, [rows.train.answers(one).tolist() for one in shown], rows.train.describe
    return rows.train, shown, lambda index: ""


def training_texts(run: str, count: int = 64) -> list[str]:
    """The first samples a run was trained on, as text."""
    folder = Path(run)
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{run}: not a run folder, so it has no rows to compare on: add --text FILE")
    config = Run(folder).config
    if functions_of(config.prompts if isinstance(config, PPO) else config.data):  # a rule is not run here
        raise UserError(
            f"{run}: its config names code, which merging will not run: add --text FILE to compare on"
        )
    tokenizer = load_tokenizer(model_of(config))
    data = load_rows(config, tokenizer)
    examples = data.train
    if isinstance(examples, Comparisons):
        examples = examples.sequences
    elif isinstance(examples, PromptSet):
        examples = examples.examples()
    samples = (examples.example(index)[0].tolist() for index in range(min(count, len(examples))))
    return [tokenizer.decode(tokens) for tokens in samples]  # type: ignore[misc]
