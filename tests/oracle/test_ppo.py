"""PPO is what it says: step for step and token for token the flat twin's, which was written from the numbers alone.

The product runs as users run it (`tuner.train`); what passes between the parts of its steps is noted on its way. The
twin is given the same folders, prompts, replayed rows and the texts that the reward model reads.
"""

import importlib
import itertools
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tuner
from tests.oracle import flat_ppo
from tests.shallow_models import shallow
from tuner.config import (
    PPO,
    SFT,
    AdamW,
    Chat,
    Constant,
    Evaluation,
    LoRA,
    Model,
    PolicyEvaluation,
    Preferences,
    Prompts,
    Replay,
    RewardModel,
    Sampling,
    Source,
    override,
)
from tuner.models.scorer import ScoreRequest
from tuner.training.step import Step

stage = importlib.import_module("tuner.stages.rl.loop")
preparing = importlib.import_module("tuner.stages.rl.prepare")
SHALLOW = shallow(2)
SHAPE = {"precision": "fp32", "gradient_checkpointing": False}
SFT_RUN = SFT(
    name="sft",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=8, alpha=16),
    data=Chat(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=64, limit=400),
    optimizer=AdamW(lr=1e-2, eps=1e-4),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=40,  # until most answers come to an end
    evaluation=Evaluation(samples=0),
    **SHAPE,
)
REWARD_RUN = RewardModel(
    name="reward",
    model=Model(path=SHALLOW),
    adapter=LoRA(r=4, alpha=16, dropout=0.1),  # not the policy's rank, and a dropout that PPO leaves off
    conditions={
        name: f"tuner:twins/{name}.txt" for name in ("brief", "detailed", "polite", "blunt", "json", "plain")
    },
    data=Preferences(files=("tuner:twins/train.jsonl",), template="internlm2", max_length=256, limit=40),
    optimizer=AdamW(lr=5e-3, eps=1e-4),
    tokens_per_step=512,
    tokens_per_pass=512,
    max_steps=8,
    **SHAPE,
)
EVERYTHING = PPO(
    name="ppo",
    policy=Model(path="filled in"),
    reward="filled in",
    prompts=Prompts(
        files=(
            Source(path="tuner:sums/train.jsonl", condition="brief", limit=21),
            Source(path="tuner:sums/test.jsonl", condition="polite", limit=9),
            Source(path="tuner:sums/test.jsonl", limit=8, system="Be exact."),
        ),
        template="internlm2",
        max_length=64,
    ),
    prompts_per_step=7,  # of 38: epochs end within steps
    sampling=Sampling(max_new_tokens=11, temperature=0.8, top_p=0.9),  # some answers come to no end
    kl=0.05,
    gae_lambda=0.95,
    missing_end_penalty=0.1,
    reward_clip=0.12,
    update_epochs=2,
    mini_batches=2,
    critic_warmup=2,
    critic_lr=5e-4,
    # the usual eps of 1e-8 makes whole steps of the rounding of gradients near zero, and 40 updates carry it far
    optimizer=AdamW(lr=6e-4, eps=1e-3),
    schedule=Constant(warmup=0),
    replay=Replay(
        files=(Source(path="tuner:sums/train.jsonl", limit=16),), template="internlm2", max_length=64
    ),
    tokens_per_pass=128,  # several rows to a mini-batch
    max_steps=10,
    epochs=9,
    seed=3,
    evaluation=PolicyEvaluation(samples=0),
    **SHAPE,
)
OTHERWISE = {
    "kl_estimator": "k3",
    "value_clip": 0.05,
    "whiten_advantages": True,
    "normalize_rewards": False,
    "gamma": 0.9,
    "critic_warmup": 0,
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "replay": None,
    "optimizer.lr": 1.5e-3,
    "critic_lr": 3e-3,
    "max_steps": 4,
}
EARLY, LATE = {"rel": 2e-4, "abs": 5e-6}, {"rel": 2e-3, "abs": 3e-4}
"""Until the policy moves, and after it: rounding grows with every update."""
CASES = {"everything": {}, "otherwise": OTHERWISE}
"""What the config of each case changes."""
PER_ANSWER = ("answers", "logprobs", "reference_logprobs", "values", "rewards", "advantages", "returns")
MEASURES = (
    *("score", "reward", "kl", "kl_k3", "entropy", "length", "ended", "value", "explained_variance"),
    "replay_tokens",
)
"""What the record says of a step beside its updates, under the twin's names."""


@dataclass
class Product:
    """A run of the product, and what passed through its steps, in the twin's names."""

    made: Any = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    run: Any = None

    def begin(self, rollout: Any, numbers: np.ndarray) -> None:
        answers = [answer.tokens.tolist() for answer in rollout.answers]
        self.steps.append({"prompts": numbers.tolist(), "answers": answers, "updates": []})

    def see(self, rollout: Any, scores_A: np.ndarray, seen: Any) -> None:
        """Rows of packed answers to lists of each answer's own."""
        columns: dict[str, list[Any]] = {name: [None] * len(rollout) for name in PER_ANSWER[1:]}
        for one in seen:
            tensors = (
                one.old_N,
                one.reference_N,
                one.values_N,
                one.rewards_N,
                one.advantages_N,
                one.returns_N,
            )
            for column, tensor_N in zip(columns.values(), tensors, strict=True):
                for answer, (begin, end) in zip(
                    one.row.answers, itertools.pairwise(one.row.borders), strict=True
                ):
                    column[answer] = tensor_N[begin:end].tolist()
        self.steps[-1] |= {"scores": scores_A.tolist(), **columns}

    def update(self, step: Step) -> None:
        norms = {f"grad_norm_{name}": norm for name, norm in step.grad_norms.items()}
        values = {name: value for name, (value, _) in step.updates[-1].items()}
        self.steps[-1]["updates"].append({**values, **norms})


@pytest.fixture
def product(monkeypatch) -> Product:
    """Notes what the steps of the runs of a test make."""
    found = Product()

    def watch(name: str, note: Any, place: Any = stage) -> None:
        original = getattr(place, name)

        def watching(*args: Any, **settings: Any) -> Any:
            result = original(*args, **settings)
            note(result, *args)
            return result

        monkeypatch.setattr(place, name, watching)

    def reward(result: Any, *_: Any) -> None:
        learned_A, kept = result
        found.steps[-1] |= {"final_rewards": learned_A.tolist(), "moments": dict(kept)}

    scores: list[np.ndarray] = []
    updating = Step.update

    def update(step: Step, *only: str) -> None:
        updating(step, *only)
        found.update(step)

    watch("prepare", lambda made, *_: setattr(found, "made", made))
    watch("answer_prompts", lambda rollout, engine, tokenizer, prompts, chosen: found.begin(rollout, chosen))
    watch("shape_scores", reward, preparing)
    watch("rollout_figures", lambda _, rollout, scores_A, *rest: scores.append(scores_A))
    watch("token_means", lambda _, rollout, seen, *rest: found.see(rollout, scores[-1], seen))
    watch(
        "updates",
        lambda _, *args: found.steps[-1].update(replay_rows=[int(row) for row in args[3]]),
        preparing,
    )
    monkeypatch.setattr(Step, "update", update)
    return found


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Runs that PPO begins with: a policy that answers sums and a reward model with conditions."""
    runs = tmp_path_factory.mktemp("starts")
    return {"policy": tuner.train(SFT_RUN, runs=runs), "reward": tuner.train(REWARD_RUN, runs=runs)}


def run_twin(
    config: PPO, product: Product, starts: Any, replay: Any
) -> tuple[list[dict[str, Any]], flat_ppo.Roles]:
    """The twin's steps, and its roles as they are after the last, from what the product was given."""
    made = product.made
    same = {
        name: getattr(config, name)
        for name in flat_ppo.Settings.__dataclass_fields__
        if hasattr(config, name)
    }
    sampling = {name: getattr(config.sampling, name) for name in ("max_new_tokens", "temperature", "top_p")}
    optimizer = {name: getattr(config.optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
    settings = flat_ppo.Settings(
        **same
        | sampling
        | optimizer
        | {name: str(run.model_folder) for name, run in starts.items()}
        | {
            "base": SHALLOW,
            "steps": config.max_steps,
            "end_ids": tuple(made.engine.end_ids),
            "entropy": True,
        },
    )
    if config.replay is not None:
        changes = {"replay_coefficient": config.replay.coefficient, "replay_ratio": config.replay.ratio}
        settings = replace(settings, **changes)
    prompts = [made.stream.prompts.tokens(number).tolist() for number in range(len(made.stream.prompts))]

    def score(numbers: list[int], answers: list[list[int]]) -> list[list[int]]:
        asked = []
        for number, answer in zip(numbers, answers, strict=True):
            said = answer[:-1] if answer[-1] in made.engine.end_ids else answer
            prompt = made.stream.prompts.prompt(number)
            text = made.roles.tokenizer.decode(said, skip_special_tokens=False)
            asked.append(ScoreRequest(prompt.with_answer(text), prompt.condition, prompt.turns))
        return [tokens.tolist() for tokens in made.reward.inputs.make(asked)]

    roles = flat_ppo.load_roles(settings)
    return flat_ppo.train(settings, prompts, score, replay, roles), roles


def replay_rows(made: Any) -> list[tuple[list[int], list[int]]] | None:
    if made.replay is None:
        return None
    examples = made.replay.examples
    rows = [examples.example(number) for number in range(len(examples))]
    assert {weight for _, weights in rows for weight in weights.tolist()} == {0.0, 1.0}
    return [(tokens.tolist(), [int(weight) for weight in weights]) for tokens, weights in rows]


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_the_twin(case, product, starts, tmp_path):
    folders = {f"{name}.path": str(run.folder) for name, run in starts.items()}
    config = override(EVERYTHING, folders | CASES[case])
    run = tuner.train(config, runs=tmp_path)
    replay = replay_rows(product.made)
    twin, roles = run_twin(config, product, starts, replay)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len(product.steps) == len(twin) == config.max_steps
    for record, own, their in zip(records, product.steps, twin, strict=True):
        near = EARLY if their["step"] <= config.critic_warmup else LATE
        assert_same_step(own, their, near)
        assert_same_updates(own["updates"], their, config, near)
        assert_same_record(record, own, their, config, replay, near)
    assert_same_weights(run, product, roles)
    assert_something_happened(records, twin, config)


def assert_same_step(own, their, near):
    """Answers token for token, and everything that is known of each token; scores and their moments."""
    for name in ("prompts", "answers", "replay_rows"):
        assert own[name] == their[name], (their["step"], name)
    for name in ("scores", "final_rewards"):
        assert own[name] == pytest.approx(their[name], **near), (their["step"], name)
    for name in PER_ANSWER[1:]:
        for answer, (one, other) in enumerate(zip(own[name], their[name], strict=True)):
            assert one == pytest.approx(other, **near), (their["step"], name, answer)
    count, mean, squares = (own["moments"][name] for name in ("count", "mean", "squares"))
    assert count == their["reward_count"]
    assert mean == pytest.approx(their["reward_mean"], **near)
    assert np.sqrt(squares / count) == pytest.approx(their["reward_std"], **near)


def assert_same_updates(own, their, config, near):
    """Every optimiser step of a step. The product's replay loss is named without its coefficient, and the critic's
    warm-up has no figures of the policy's."""
    shares = np.array_split(their["replay_rows"], len(their["updates"]))
    for number, (one, other, share) in enumerate(zip(own, their["updates"], shares, strict=True)):
        expected = dict(other)
        if config.replay is not None:
            expected["replay_loss"] /= config.replay.coefficient
        if their["step"] < config.critic_warmup:
            learned_not = ("policy_loss", "ratio", "clipped", "grad_norm_policy")
            assert [expected.pop(name) for name in learned_not] == [0] * 4
        if not len(share):
            assert expected.pop("replay_loss") == 0
        own_alone = one.keys() - expected.keys()
        assert own_alone <= {"update_kl"}  # of which the twin knows nothing
        assert {name: one[name] for name in expected} == pytest.approx(expected, **near), (
            their["step"],
            number,
        )


def assert_same_record(record, own, their, config, replay, near):
    """The line in metrics.jsonl: means over the updates that have a measure, by their tokens; the last norms."""
    parts = np.array_split(np.arange(len(their["answers"])), config.mini_batches) * config.update_epochs
    shares = np.array_split(their["replay_rows"], len(parts))
    answered = [sum(len(their["answers"][place]) for place in part) for part in parts]
    replayed = [sum(sum(replay[row][1][1:]) for row in share) for share in shares]
    weights = {"replay_loss": replayed}
    for name in ("loss", "policy_loss", "value_loss", "replay_loss", "ratio", "clipped"):
        having = [
            (one[name], weight)
            for one, weight in zip(own["updates"], weights.get(name, answered), strict=True)
            if name in one
        ]
        assert (name in record) == bool(having), name
        if having:
            values, of_values = zip(*having, strict=True)
            assert record[name] == pytest.approx(np.average(values, weights=of_values)), name
    for name in ("grad_norm_policy", "grad_norm_critic"):
        assert record.get(name) == own["updates"][-1].get(name), name
    for name in MEASURES:
        if name != "replay_tokens" or their["replay_rows"]:
            assert record[name] == pytest.approx(their[name], **near), (their["step"], name)


def assert_same_weights(run, product, roles):
    """Of the policy as it is saved, and of the critic as it is when the run is over."""
    saved = load_file(run.model_folder / "adapter_model.safetensors")
    policy = {name.replace(".weight", ".policy.weight"): tensor for name, tensor in saved.items()}
    critic = dict(product.made.roles.trained("critic"))
    head_1H = critic.pop("score.weight")
    theirs = dict(roles.model.named_parameters())
    for ours, role in ((policy, "policy"), (critic, "critic")):
        assert ours.keys() == {name for name in theirs if f".{role}." in name}
        for name, weight in ours.items():
            assert torch.dist(weight, theirs[name]) <= 1e-3 * theirs[name].norm(), name
    assert torch.dist(head_1H, roles.critic_head_1H.weight) <= 1e-3 * head_1H.norm()
    assert head_1H.norm() > 0


def assert_something_happened(records, twin, config):
    """Trajectories on which nothing happens are alike, too."""
    assert records[-1]["kl"] > 0.01
    assert {record["clipped"] > 0 for record in records[config.critic_warmup :]} >= {True}
    assert 0 < records[0]["ended"] < 1
    cut = [
        abs(score - config.missing_end_penalty) > config.reward_clip
        for row in twin
        for score in row["scores"]
    ]
    assert {True, False} == set(cut)
    if config.replay is not None:
        assert (
            sum(len(row["replay_rows"]) for row in twin) > config.replay.sources[0].limit
        )  # into a second epoch
    if config.value_clip is not None:
        values = [abs(value) for answer in twin[1]["values"] for value in answer]
        assert max(values) > config.value_clip  # from 0 in the step before
