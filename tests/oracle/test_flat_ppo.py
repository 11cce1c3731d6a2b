"""The flat PPO twin alone: what it is compared by must itself be right."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.oracle.flat_ppo import (
    Moments,
    Settings,
    answer_texts,
    final_rewards,
    gae,
    generate,
    load_roles,
    logprobs_at,
    packed_groups,
    per_text,
    sample,
    tiny_folders,
    train,
    update,
)

DRAW = np.random.default_rng(7)
PROMPTS = [DRAW.integers(5, 48, length).tolist() for length in DRAW.integers(1, 12, 10)]
REPLAY = [
    (DRAW.integers(5, 48, length).tolist(), [1, *DRAW.integers(0, 2, length - 2).tolist(), 1])
    for length in DRAW.integers(4, 20, 12)
]


def score(numbers, answers):
    return [[3, *PROMPTS[i], *answer, 4] for i, answer in zip(numbers, answers, strict=True)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return replace(
        tiny_folders(tmp_path_factory.mktemp("flat")),
        prompts_per_step=6,
        max_new_tokens=12,
        end_ids=(2, 7, 8, 9, 10, 11),
        tokens_per_pass=40,
        lr=1e-2,
        critic_lr=1e-2,
    )


def flat(lists):
    return list(chain.from_iterable(lists))


def doubles(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_advantages_by_hand():
    # gamma 0.5, lambda 0.5: deltas (1 + 0.5 - 2, 0 + 2 - 1, 2 + 0 - 4) = (-0.5, 1, -2), each followed by a quarter
    short, long = gae(doubles([3.0], [1.0, 0.0, 2.0]), doubles([1.0], [2.0, 1.0, 4.0]), gamma=0.5, lam=0.5)
    assert short.tolist() == [2.0]  # the answer beside it in the batch is longer, and no part of it
    assert long.tolist() == [-0.5 + 0.25 * (1 + 0.25 * -2), 1 + 0.25 * -2, -2.0]


def advantage(rewards, values, t, gamma, lam):
    """The definition, and nothing clever."""
    if t == len(rewards):
        return 0.0
    following = values[t + 1] if t + 1 < len(values) else 0.0
    delta = rewards[t] + gamma * following - values[t]
    return delta + gamma * lam * advantage(rewards, values, t + 1, gamma, lam)


def test_advantages_against_the_definition():
    rewards, values = ([DRAW.normal(size=length).tolist() for length in (5, 1, 9)] for _ in range(2))
    for row, r, v in zip(gae(doubles(*rewards), doubles(*values), 0.9, 0.7), rewards, values, strict=True):
        assert row.tolist() == pytest.approx([advantage(r, v, t, 0.9, 0.7) for t in range(len(r))])


@pytest.mark.parametrize(
    ("top_p", "u", "token"),
    [
        (1.0, 0.0, 0),
        (1.0, 0.1249, 0),
        (1.0, 0.125, 1),  # the first whose sum is greater, not equal
        (1.0, 0.87, 2),
        (1.0, 0.999, 3),
        (0.5, 0.999, 1),  # what stands before the second, 0.5, is not below 0.5
        (0.51, 0.66, 1),  # 0.5 and 0.25 are kept, in the vocabulary's order: 0, 0.5, 0.75, 0.75
        (0.51, 0.67, 2),
        (0.51, 0.999, 2),
        (0.76, 0.0, 0),  # of the two of 0.125 the nucleus takes the first
        (0.76, 0.999, 2),
    ],
)
def test_top_p_by_hand(top_p, u, token):
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log() * 2  # halved again by the temperature
    assert sample(logits, torch.tensor([u], dtype=torch.float64), 2.0, top_p).tolist() == [token]


def test_moments_of_all_steps_come_before_their_use():
    moments, seen = Moments(), []
    settings = Settings("", "", "", reward_clip=2.0, missing_end_penalty=0.5)
    for scores in ([1.0, -4.0, 0.25], [3.0, 0.5]):
        seen += [min(max(x - 0.5, -2), 2) for x in scores]
        found = final_rewards(settings, scores, [False] * len(scores), moments)
        expected = (np.array(seen) - np.mean(seen)) / (np.std(seen) + 1e-8)
        assert found == pytest.approx(expected[-len(scores) :])


def test_rows_hold_every_text_once_and_no_more_than_fits():
    lengths = [5, 1, 9, 3, 12, 4, 4]
    groups = packed_groups(lengths, limit=10)
    assert sorted(flat(groups)) == list(range(7))
    assert [4] in groups
    assert len(groups) == 4  # 26 tokens beside the one that is too long, in three rows: 9+1, 5+4, 4+3
    assert all(sum(lengths[i] for i in group) <= 10 for group in groups if group != [4])


def test_packed_equals_padded(settings):
    settings = replace(
        settings,
        steps=3,
        temperature=0.8,
        top_p=0.95,
        kl=0.1,
        kl_estimator="k3",
        value_clip=0.02,
        whiten_advantages=True,
        missing_end_penalty=0.3,
        mini_batches=2,
        update_epochs=2,
        critic_warmup=1,
        entropy=True,
    )
    packed, padded = (train(replace(settings, packed=way), PROMPTS, score, REPLAY) for way in (True, False))
    assert packed[2]["kl"] > 1e-3, "the policy has moved"
    assert {u["clipped"] > 0 for u in packed[2]["updates"]} == {True, False}, (
        "the clip bites, but not at first"
    )
    for a, b in zip(packed, padded, strict=True):
        assert a["answers"] == b["answers"]
        for name in a.keys() | b.keys():
            pairs = zip(a[name], b[name], strict=True) if isinstance(a[name], list) else [(a[name], b[name])]
            if "seconds" not in name:
                for one, other in pairs:
                    assert one == pytest.approx(other, rel=1e-3, abs=1e-5), name


def test_generation_is_sampling_from_the_whole_text_every_time(settings):
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings.base), settings.policy
    ).eval()
    answers = generate(load_roles(settings), settings, 3, PROMPTS)
    assert len({len(answer) for answer in answers}) > 3
    for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        uniform = np.random.default_rng((settings.seed, 3, place)).random(settings.max_new_tokens)
        tokens = list(prompt)
        for u in uniform:
            with torch.no_grad():
                logits = policy(torch.tensor([tokens])).logits[:, -1]
            tokens += sample(logits, torch.tensor([u]), settings.temperature, settings.top_p).tolist()
            if tokens[-1] in settings.end_ids:
                break
        assert tokens == prompt + answer


def test_first_step_against_the_models_as_peft_loads_them(settings):
    # one update: ratio 1, so the losses are plain means. The critic's adapter first moves in the second update, when
    # its head is no longer zero: the third step shows that the reward model has not moved with it
    rows = train(replace(settings, steps=3, temperature=0.8, replay_ratio=1.0), PROMPTS, score, REPLAY)
    row = rows[0]
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings.base), settings.policy
    ).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(settings.base, num_labels=1)
    reward = PeftModel.from_pretrained(reward, settings.reward).eval()
    with torch.no_grad():
        for i, answer, logprobs in zip(row["prompts"], row["answers"], row["logprobs"], strict=True):
            tokens = torch.tensor([PROMPTS[i] + answer])
            all_logprobs = (policy(tokens).logits[0, :-1] / 0.8).log_softmax(-1)
            expected = all_logprobs.gather(1, tokens[0, 1:, None])[-len(answer) :, 0]
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        sequences = flat(score(one["prompts"], one["answers"]) for one in rows)
        for sequence, found in zip(sequences, flat(one["scores"] for one in rows), strict=True):
            assert found == pytest.approx(reward(torch.tensor([sequence])).logits.item(), abs=1e-5)
        losses = []
        for number in row["replay_rows"]:
            tokens, weights = (torch.tensor(column) for column in REPLAY[number])
            each = torch.nn.functional.cross_entropy(
                policy(tokens[None]).logits[0, :-1], tokens[1:], reduction="none"
            )
            losses += each[weights[1:] == 1].tolist()
    assert len(row["replay_rows"]) > 2
    assert row["replay_loss"] == pytest.approx(0.5 * np.mean(losses), rel=1e-5)

    assert row["kl"] == 0
    assert row["updates"][0]["ratio"] == pytest.approx(1, abs=1e-12)
    assert flat(row["values"]) == [0] * sum(map(len, row["answers"]))
    assert row["policy_loss"] == pytest.approx(-np.mean(flat(row["advantages"])), abs=1e-6)
    assert row["value_loss"] == pytest.approx(np.mean(np.square(flat(row["returns"]))) / 2, rel=1e-5)
    assert [rewards[-1] for rewards in row["rewards"]] == pytest.approx(row["final_rewards"])


@pytest.mark.parametrize(
    ("estimator", "k"),
    [("k1", lambda d: d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: np.exp(-d) - 1 + d)],
)
def test_a_step_adds_up(settings, estimator, k):
    numbers = {
        "kl": 0.1,
        "kl_estimator": estimator,
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "whiten_advantages": True,
    }
    row = train(replace(settings, steps=2, **numbers), PROMPTS, score)[1]
    assert row["kl_k3"] > 1e-3
    all_advantages, all_returns = [], []
    columns = (row[name] for name in ("logprobs", "reference_logprobs", "values", "final_rewards", "rewards"))
    for logprobs, reference, values, final, found in zip(*columns, strict=True):
        rewards = -0.1 * k(np.array(logprobs) - np.array(reference))
        rewards[-1] += final
        assert found == pytest.approx(rewards.tolist(), abs=1e-6)
        advantages = [advantage(rewards, values, t, 0.9, 0.7) for t in range(len(values))]
        all_advantages += advantages
        all_returns += [a + v for a, v in zip(advantages, values, strict=True)]
    whitened = (np.array(all_advantages) - np.mean(all_advantages)) / (np.std(all_advantages) + 1e-8)
    assert flat(row["advantages"]) == pytest.approx(whitened.tolist(), abs=1e-5)
    assert flat(row["returns"]) == pytest.approx(all_returns, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_both_clips_by_hand(settings, packed):
    settings = replace(settings, packed=packed, value_clip=0.1, critic_lr=0.0, lr=0.0)
    roles = load_roles(settings)
    texts = answer_texts([[5, 6], [7], [8, 9, 10]], [[11, 12], [13], [14, 15, 16]])

    def read(hidden_RH, places_A, targets_A):
        return logprobs_at(roles, settings, hidden_RH, places_A, targets_A, settings.temperature)

    now = per_text(roles, settings, "policy", texts, read)
    ratios = doubles([9.0, 9.0], [1.5], [1.5, 0.5, 0.5])  # the first answer is not of the mini-batch
    old = {
        "logprobs": [logprobs - ratio.log() for logprobs, ratio in zip(now, ratios, strict=True)],
        "advantages": doubles([9.0, 9.0], [2.0], [-2.0, 2.0, -2.0]),
        "values": doubles([9.0, 9.0], [0.3], [0.3, 0.05, -0.3]),  # the critic's head of zeros says 0 now
        "returns": doubles([9.0, 9.0], [1.0], [-1.0, 1.0, -1.0]),
    }
    optimizer = torch.optim.AdamW([{"params": roles.parameters_of(role)} for role in ("policy", "critic")])
    row = update(roles, settings, optimizer, texts, old, [2, 1], [], learn_policy=True)
    # 1.2 x 2 held, 1.5 x -2 free, 0.5 x 2 free, 0.8 x -2 held
    assert row["policy_loss"] == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6) / 4, abs=1e-6)
    assert row["clipped"] == 0.5
    assert row["ratio"] == pytest.approx(4.0 / 4, abs=1e-6)
    # the old value moved by 0.1 at most: 0.2, 0.2, 0 (within it), -0.2; the worse of it and of 0 counts
    assert row["value_loss"] == pytest.approx(0.5 * (1.0 + 1.2**2 + 1.0 + 1.0) / 4, abs=1e-6)


def test_warmup_leaves_the_policy_and_the_replay_alone(settings):
    roles = load_roles(settings)
    before = {name: tensor.clone() for name, tensor in roles.model.state_dict().items()}
    rows = train(replace(settings, steps=2, critic_warmup=2), PROMPTS, score, REPLAY, roles)
    changed = {
        name for name, tensor in roles.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(".critic." in name for name in changed)
    assert roles.critic_head_1H.weight.abs().sum() > 0
    assert [row["replay_rows"] for row in rows] == [[], []]


def test_orders_and_the_replay_that_is_owed(settings):
    rows = train(replace(settings, steps=8, replay_ratio=0.3), PROMPTS, score, REPLAY)
    order = np.concatenate([np.random.default_rng((settings.seed, e)).permutation(10) for e in range(5)])
    assert flat(row["prompts"] for row in rows) == order[:48].tolist()

    drawn = np.concatenate(
        [np.random.default_rng((settings.seed, e)).permutation(12) for e in range(5)]
    ).tolist()
    lengths = np.cumsum([len(REPLAY[number][0]) for number in drawn])
    tokens = np.cumsum([row["tokens"] for row in rows])
    taken = np.cumsum([len(row["replay_rows"]) for row in rows])
    assert flat(row["replay_rows"] for row in rows) == drawn[: taken[-1]]
    assert taken.tolist() == [int((lengths <= 0.3 * owing).sum()) for owing in tokens]
    assert taken[-1] > 12, "more than an epoch of it"
