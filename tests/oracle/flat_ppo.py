"""PPO on one page: the flat twin of the trainer, written from the algorithm's numbers and from nothing else.

One frozen base carries four roles as PEFT adapters, all in fp32: policy and critic are trained, reference and reward
are not. `train` is the whole of it, from loading to the optimiser's steps; what it calls stands above it.

Two ways of running the scoring and updating passes, equal to rounding:
packed (default): texts end to end in one row, nothing padded, attention apart per text, logits where they are read;
padded: right-padded batches under sdpa and logits at every position, as a bare four-model loop is usually written.

    python tests/oracle/flat_ppo.py        three steps on a random tiny Llama, both ways

Shapes: N texts of a batch, T tokens of an answer, R positions of a pass (batch x length, or the packed row's length),
A positions that are read, V vocabulary, H hidden size.
"""

import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

HEAD = "base_model.model.score.weight"  # where PEFT keeps a classifier's head in adapter_model.safetensors


@dataclass(frozen=True)
class Settings:
    base: str  # a Hugging Face folder of a causal language model
    policy: str  # a PEFT folder, CAUSAL_LM: the policy starts there, the reference stays there
    reward: str  # a PEFT folder, SEQ_CLS, with its head: the reward stays there, the critic starts there
    seed: int = 0
    steps: int = 1
    prompts_per_step: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 0.9
    end_ids: tuple[int, ...] = (2,)
    kl: float = 0.01
    kl_estimator: str = "k1"
    gamma: float = 1.0
    gae_lambda: float = 0.99
    clip: float = 0.2
    value_clip: float | None = None
    whiten_advantages: bool = False
    reward_clip: float = 5.0
    normalize_rewards: bool = True
    missing_end_penalty: float = 0.0
    update_epochs: int = 1
    mini_batches: int = 1
    critic_warmup: int = 0
    lr: float = 1e-6
    critic_lr: float = 5e-6
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    replay_coefficient: float = 0.5
    replay_ratio: float = 0.5
    tokens_per_pass: int = 16384
    packed: bool = True
    entropy: bool = False  # one more forward pass per step, for the figure alone


# --- 1. four roles on one base ------------------------------------------------------------------------------


@dataclass
class Roles:
    model: PeftModel
    causal: nn.Module  # the base with the adapters in it
    reward_head_1H: nn.Linear
    critic_head_1H: nn.Linear

    def act_as(self, role: str) -> None:
        """Makes one adapter active. PEFT lets that one alone take gradients: backward before the next switch."""
        self.model.set_adapter(role)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        adapter = [p for name, p in self.model.named_parameters() if f".{role}." in name]
        return adapter + (list(self.critic_head_1H.parameters()) if role == "critic" else [])


def load_roles(settings: Settings) -> Roles:
    causal = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(causal, settings.policy, adapter_name="policy", is_trainable=True)
    model.load_adapter(settings.policy, adapter_name="reference")

    tensors = load_file(Path(settings.reward) / "adapter_model.safetensors")
    head_1H = tensors.pop(HEAD).float()
    for role in ("reward", "critic"):
        config = LoraConfig.from_pretrained(settings.reward)
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, False
        model.add_adapter(role, config)
        loaded = set_peft_model_state_dict(model, tensors, adapter_name=role)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        assert not [key for key in loaded.missing_keys if f".{role}." in key], loaded.missing_keys

    reward_head, critic_head = (nn.Linear(head_1H.shape[1], 1, bias=False) for _ in range(2))
    reward_head.weight.data.copy_(head_1H)
    nn.init.zeros_(critic_head.weight)
    model.eval()  # no dropout in any role, while learning neither
    return Roles(model, model.get_base_model(), reward_head, critic_head)


# --- 2. forward passes, packed and padded -------------------------------------------------------------------


@dataclass
class Texts:
    """What a pass reads. A token's log-probability, and the value it is met with, stand at the position before it."""

    inputs: list[list[int]]
    places: list[Tensor]  # per text, the positions that are read
    targets: list[Tensor]  # per text, the token that follows each of them

    def take(self, chosen: list[int]) -> "Texts":
        return Texts(*([column[i] for i in chosen] for column in (self.inputs, self.places, self.targets)))


def answer_texts(prompts: list[list[int]], answers: list[list[int]]) -> Texts:
    return Texts(
        inputs=[(prompt + answer)[:-1] for prompt, answer in zip(prompts, answers, strict=True)],
        places=[torch.arange(len(p) - 1, len(p) - 1 + len(a)) for p, a in zip(prompts, answers, strict=True)],
        targets=[torch.tensor(answer) for answer in answers],
    )


def replay_texts(rows: list[tuple[list[int], list[int]]]) -> Texts:
    learned = [torch.tensor(weights[1:]).nonzero().flatten() for _, weights in rows]
    return Texts(
        inputs=[list(tokens[:-1]) for tokens, _ in rows],
        places=learned,
        targets=[torch.tensor(tokens[1:])[at] for (tokens, _), at in zip(rows, learned, strict=True)],
    )


def packed_attention(module, query, key, value, attention_mask, scaling=None, lengths=None, **_):
    """Each text attends to itself. split and cat, not slices: a slice's backward writes the whole row every time."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1), None


# a name without a mask function of its own gets no mask at all
AttentionInterface.register("flat_packed", packed_attention)


def packed_groups(lengths: list[int], limit: int) -> list[list[int]]:
    """Best fit, longest first; a text longer than the limit has a row of its own."""
    groups, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [g for g, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            groups.append([])
            room.append(limit)
        best = min(fitting, key=room.__getitem__) if fitting else len(groups) - 1
        groups[best].append(i)
        room[best] -= lengths[i]
    return groups


def padded_groups(lengths: list[int], limit: int) -> list[list[int]]:
    """Equal counts in the order given, as many as keep count x longest within the limit."""
    count = max(1, limit // max(lengths, default=1))
    return [list(range(i, min(i + count, len(lengths)))) for i in range(0, len(lengths), count)]


def packed_hidden(roles: Roles, rows: list[list[int]]) -> tuple[Tensor, list[int]]:
    roles.causal.config._attn_implementation = "flat_packed"
    lengths = [len(row) for row in rows]
    tokens_1R = torch.tensor(list(itertools.chain.from_iterable(rows)))[None]
    positions_1R = torch.cat([torch.arange(length) for length in lengths])[None]
    out = roles.causal.base_model(tokens_1R, position_ids=positions_1R, use_cache=False, lengths=lengths)
    return out.last_hidden_state[0], [0, *itertools.accumulate(lengths)][:-1]


def padded_hidden(roles: Roles, rows: list[list[int]]) -> tuple[Tensor, list[int]]:
    roles.causal.config._attn_implementation = "sdpa"
    longest = max(len(row) for row in rows)
    tokens_NT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask_NT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    out = roles.causal.base_model(tokens_NT, attention_mask=mask_NT, use_cache=False)
    return out.last_hidden_state.flatten(0, 1), [i * longest for i in range(len(rows))]


def forward_passes(roles: Roles, settings: Settings, role: str, texts: Texts) -> Iterator[tuple]:
    """Yields, pass by pass: the texts' numbers, hidden_RH, the positions to read in it, the tokens after them."""
    roles.act_as(role)
    grouped, hidden = (packed_groups, packed_hidden) if settings.packed else (padded_groups, padded_hidden)
    for group in grouped([len(row) for row in texts.inputs], settings.tokens_per_pass):
        hidden_RH, starts = hidden(roles, [texts.inputs[i] for i in group])
        places_A = torch.cat([texts.places[i] + start for i, start in zip(group, starts, strict=True)])
        yield group, hidden_RH, places_A, torch.cat([texts.targets[i] for i in group])


def logprobs_at(roles: Roles, settings: Settings, hidden_RH, places_A, targets_A, temperature) -> Tensor:
    head = roles.causal.get_output_embeddings()
    if settings.packed:
        logits_AV = head(hidden_RH.index_select(0, places_A))
        logits_AV = logits_AV if temperature == 1 else logits_AV / temperature
        return -F.cross_entropy(logits_AV, targets_A, reduction="none")
    return F.log_softmax(head(hidden_RH) / temperature, dim=-1)[places_A, targets_A]


def scalars_at(head: nn.Linear, settings: Settings, hidden_RH, places_A) -> Tensor:
    if settings.packed:
        return head(hidden_RH.index_select(0, places_A))[:, 0]
    return head(hidden_RH)[places_A, 0]


@torch.no_grad()
def per_text(roles: Roles, settings: Settings, role: str, texts: Texts, read: Callable) -> list[Tensor]:
    found: list = [None] * len(texts.inputs)
    for group, hidden_RH, places_A, targets_A in forward_passes(roles, settings, role, texts):
        parts = read(hidden_RH, places_A, targets_A).split([len(texts.places[i]) for i in group])
        for i, part in zip(group, parts, strict=True):
            found[i] = part
    return found


# --- 3. the rollout -----------------------------------------------------------------------------------------


def shuffled_for_ever(seed: int, count: int) -> Iterator[int]:
    for epoch in itertools.count():
        yield from np.random.default_rng((seed, epoch)).permutation(count).tolist()


def sample(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float) -> Tensor:
    p_NV = torch.softmax(logits_NV.float() / temperature, dim=-1)
    if top_p < 1:
        sorted_NV, order_NV = p_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = F.pad(sorted_NV.double().cumsum(-1)[:, :-1], (1, 0))
        p_NV = p_NV.scatter(-1, order_NV, sorted_NV.masked_fill(before_NV >= top_p, 0))
    cumulated_NV = p_NV.double().cumsum(-1)
    threshold_N1 = (uniform_N * cumulated_NV[:, -1])[:, None]
    return torch.searchsorted(cumulated_NV, threshold_N1, right=True)[:, 0]  # the first c > threshold


@torch.no_grad()
def generate(roles: Roles, settings: Settings, step: int, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, padded on the left; rows that have ended stay until all have."""
    roles.act_as("policy")
    roles.causal.config._attn_implementation = "sdpa"
    draws = [np.random.default_rng((settings.seed, step, place)) for place in range(len(prompts))]
    uniform_NT = torch.from_numpy(np.stack([draw.random(settings.max_new_tokens) for draw in draws]))
    longest = max(len(prompt) for prompt in prompts)
    tokens_NT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_NT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions_NT = (mask_NT.cumsum(-1) - 1).clamp(min=0)
    cache = {"past_key_values": DynamicCache(config=roles.causal.config), "use_cache": True}
    answers, going = [[] for _ in prompts], set(range(len(prompts)))
    for t in range(settings.max_new_tokens):
        out = roles.causal.base_model(tokens_NT, attention_mask=mask_NT, position_ids=positions_NT, **cache)
        logits_NV = roles.causal.get_output_embeddings()(out.last_hidden_state[:, -1])
        tokens_N = sample(logits_NV, uniform_NT[:, t], settings.temperature, settings.top_p)
        for place, token in enumerate(tokens_N.tolist()):
            if place in going:
                answers[place].append(token)
                if token in settings.end_ids:
                    going.remove(place)
        if not going:
            break
        tokens_NT, positions_NT = tokens_N[:, None], positions_NT[:, -1:] + 1
        mask_NT = F.pad(mask_NT, (0, 1), value=1)
    return answers


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all numbers seen (Chan's merge)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, numbers: list[float]) -> None:
        count, mean = len(numbers), sum(numbers) / len(numbers)
        m2 = sum((x - mean) ** 2 for x in numbers)
        total, apart = self.count + count, mean - self.mean
        self.m2 += m2 + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count)


def final_rewards(
    settings: Settings, scores: list[float], ended: list[bool], moments: Moments
) -> list[float]:
    x = [s - (0 if end else settings.missing_end_penalty) for s, end in zip(scores, ended, strict=True)]
    x = [min(max(number, -settings.reward_clip), settings.reward_clip) for number in x]
    moments.add(x)
    return [(n - moments.mean) / (moments.std + 1e-8) for n in x] if settings.normalize_rewards else x


def token_rewards(settings: Settings, logprobs_T: Tensor, reference_T: Tensor, final: float) -> Tensor:
    d_T = (logprobs_T - reference_T).double()
    k_T = {"k1": d_T, "k2": d_T**2 / 2, "k3": torch.exp(-d_T) - 1 + d_T}[settings.kl_estimator]
    rewards_T = -settings.kl * k_T
    rewards_T[-1] += final
    return rewards_T


def gae(rewards: list[Tensor], values: list[Tensor], gamma: float, lam: float) -> list[Tensor]:
    """Advantages per answer. Rewards and values of 0 behind an answer's end are what its end asks for."""
    rewards_NT, values_NT = (nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (rewards, values))
    delta_NT = rewards_NT + gamma * F.pad(values_NT[:, 1:], (0, 1)) - values_NT
    advantages, following_N = [], torch.zeros(len(rewards), dtype=delta_NT.dtype)
    for delta_N in reversed(delta_NT.unbind(1)):
        following_N = delta_N + gamma * lam * following_N
        advantages.append(following_N)
    advantages_NT = torch.stack(advantages[::-1], dim=1)
    return [row[: len(r)] for row, r in zip(advantages_NT, rewards, strict=True)]


# --- 4. one optimiser step ----------------------------------------------------------------------------------


def update(
    roles: Roles, settings: Settings, optimizer, texts: Texts, old, chosen, replayed, learn_policy: bool
) -> dict:
    """old: lists per answer of the step (logprobs, values, advantages, returns); chosen: this mini-batch."""
    row = dict.fromkeys(("policy_loss", "value_loss", "replay_loss", "ratio", "clipped"), 0.0)
    texts = texts.take(chosen)
    count = sum(len(places) for places in texts.places)
    optimizer.zero_grad(set_to_none=True)

    def of(name: str, group: list[int]) -> Tensor:
        return torch.cat([old[name][chosen[i]] for i in group])

    if learn_policy:
        for group, hidden_RH, places_A, targets_A in forward_passes(roles, settings, "policy", texts):
            logprobs_A = logprobs_at(roles, settings, hidden_RH, places_A, targets_A, settings.temperature)
            ratio_A, advantages_A = torch.exp(logprobs_A - of("logprobs", group)), of("advantages", group)
            free_A = ratio_A * advantages_A
            held_A = ratio_A.clamp(1 - settings.clip, 1 + settings.clip) * advantages_A
            loss = -torch.min(free_A, held_A).sum() / count
            loss.backward()
            row["policy_loss"] += loss.item()
            row["ratio"] += ratio_A.sum().item() / count
            row["clipped"] += (held_A < free_A).sum().item() / count

        replay = replay_texts(replayed)
        learned = max(1, sum(len(places) for places in replay.places))
        for _, hidden_RH, places_A, targets_A in forward_passes(roles, settings, "policy", replay):
            logprobs_A = logprobs_at(roles, settings, hidden_RH, places_A, targets_A, temperature=1.0)
            loss = -settings.replay_coefficient * logprobs_A.sum() / learned
            loss.backward()
            row["replay_loss"] += loss.item()

    for group, hidden_RH, places_A, _ in forward_passes(roles, settings, "critic", texts):
        values_A = scalars_at(roles.critic_head_1H, settings, hidden_RH, places_A)
        returns_A = of("returns", group)
        error_A = (values_A - returns_A) ** 2
        if settings.value_clip is not None:
            old_A = of("values", group)
            near_A = old_A + (values_A - old_A).clamp(-settings.value_clip, settings.value_clip)
            error_A = torch.max(error_A, (near_A - returns_A) ** 2)
        loss = 0.5 * error_A.sum() / count
        loss.backward()
        row["value_loss"] += loss.item()

    for role, group in zip(("policy", "critic"), optimizer.param_groups, strict=True):
        row[f"grad_norm_{role}"] = nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm).item()
    optimizer.step()
    row["loss"] = row["policy_loss"] + row["value_loss"] + row["replay_loss"]
    return row


# --- 5. the loop --------------------------------------------------------------------------------------------


@dataclass
class Clock:
    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def part(self, name: str):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu


def train(
    settings: Settings,
    prompts: list[list[int]],
    score: Callable[[list[int], list[list[int]]], list[list[int]]],
    replay: list[tuple[list[int], list[int]]] | None = None,
    roles: Roles | None = None,
) -> list[dict]:
    """Runs `settings.steps` steps and returns a dict for each.

    prompts: token ids, in the order of their files. score: (numbers of the step's prompts, their answers' token ids) ->
    the token ids that the reward model reads, one sequence each; its last position gives the score. replay: rows of
    (token ids, weights of 0 or 1 that say which tokens are learned; a row's first never is). roles: from `load_roles`,
    to keep them or to leave the loading out of a timing; they are trained in place.
    """
    roles = roles or load_roles(settings)
    optimizer = torch.optim.AdamW(
        [
            {"params": roles.parameters_of("policy"), "lr": settings.lr},
            {"params": roles.parameters_of("critic"), "lr": settings.critic_lr},
        ],
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    order = shuffled_for_ever(settings.seed, len(prompts))
    replay_order = shuffled_for_ever(settings.seed, len(replay)) if replay else None
    next_row, owed = (next(replay_order), 0.0) if replay else (None, 0.0)
    moments, rows = Moments(), []

    def logprobs(hidden_RH, places_A, targets_A):
        return logprobs_at(roles, settings, hidden_RH, places_A, targets_A, settings.temperature)

    def scalars(head):
        return lambda hidden_RH, places_A, _: scalars_at(head, settings, hidden_RH, places_A)

    def entropies(hidden_RH, places_A, _):
        logits_AV = roles.causal.get_output_embeddings()(hidden_RH.index_select(0, places_A))
        return torch.distributions.Categorical(logits=logits_AV / settings.temperature).entropy()

    for step in range(settings.steps):
        clock = Clock()
        numbers = list(itertools.islice(order, settings.prompts_per_step))
        asked = [list(prompts[i]) for i in numbers]

        with clock.part("generate"):
            answers = generate(roles, settings, step, asked)
            ended = [answer[-1] in settings.end_ids for answer in answers]
        with clock.part("logprobs"):
            texts = answer_texts(asked, answers)
            old = {"logprobs": per_text(roles, settings, "policy", texts, logprobs)}
            reference = per_text(roles, settings, "reference", texts, logprobs)
            old["values"] = per_text(roles, settings, "critic", texts, scalars(roles.critic_head_1H))
        entropy = None
        if settings.entropy:
            entropy = torch.cat(per_text(roles, settings, "policy", texts, entropies)).mean().item()
        with clock.part("render"):
            scored = [list(sequence) for sequence in score(numbers, answers)]
        with clock.part("scores"):
            ends = [torch.tensor([len(sequence) - 1]) for sequence in scored]
            read = Texts(scored, ends, ends)
            scores = torch.cat(
                per_text(roles, settings, "reward", read, scalars(roles.reward_head_1H))
            ).tolist()
        with clock.part("rewards"):
            final = final_rewards(settings, scores, ended, moments)
            columns = zip(old["logprobs"], reference, final, strict=True)
            rewards = [token_rewards(settings, *column) for column in columns]
        with clock.part("advantages"):
            values = [values_T.double() for values_T in old["values"]]
            advantages = gae(rewards, values, settings.gamma, settings.gae_lambda)
            old["returns"] = [(a_T + v_T).float() for a_T, v_T in zip(advantages, values, strict=True)]
            if settings.whiten_advantages:
                every = torch.cat(advantages)
                advantages = [(a_T - every.mean()) / (every.std(correction=0) + 1e-8) for a_T in advantages]
            old["advantages"] = [a_T.float() for a_T in advantages]
        with clock.part("updates"):
            learn_policy, taken = step >= settings.critic_warmup, []
            tokens = sum(map(len, asked)) + sum(map(len, answers))
            if replay and learn_policy:  # a warm-up step neither draws nor owes
                owed += settings.replay_ratio * tokens
                while len(replay[next_row][0]) <= owed:
                    owed -= len(replay[next_row][0])
                    taken.append(next_row)
                    next_row = next(replay_order)
            parts = np.array_split(np.arange(len(numbers)), settings.mini_batches) * settings.update_epochs
            shares = np.array_split(np.array(taken, dtype=int), len(parts))
            updates = []
            for part, share in zip(parts, shares, strict=True):
                rows_of_share = [replay[i] for i in share]
                now = (texts, old, part.tolist(), rows_of_share, learn_policy)
                updates.append(update(roles, settings, optimizer, *now))

        d = (torch.cat(old["logprobs"]) - torch.cat(reference)).double()
        returns, met = torch.cat(old["returns"]).double(), torch.cat(old["values"]).double()
        row = {
            "step": step,
            "prompts": numbers,
            "answers": answers,
            "logprobs": [x.tolist() for x in old["logprobs"]],
            "reference_logprobs": [x.tolist() for x in reference],
            "values": [x.tolist() for x in old["values"]],
            "scores": scores,
            "final_rewards": final,
            "rewards": [x.tolist() for x in rewards],
            "advantages": [x.tolist() for x in old["advantages"]],
            "returns": [x.tolist() for x in old["returns"]],
            "replay_rows": taken,
            "updates": updates,
            "tokens": tokens,
            "replay_tokens": sum(len(replay[i][0]) for i in taken) if replay else 0,
            "score": sum(scores) / len(scores),
            "reward": sum(x.sum().item() for x in rewards) / len(rewards),
            "reward_count": moments.count,
            "reward_mean": moments.mean,
            "reward_std": moments.std,
            "kl": d.mean().item(),
            "kl_k3": (torch.exp(-d) - 1 + d).mean().item(),
            "length": sum(map(len, answers)) / len(answers),
            "ended": sum(ended) / len(ended),
            "entropy": entropy,
            "value": met.mean().item(),
            "explained_variance": 1 - ((returns - met).var(correction=0) / returns.var(correction=0)).item(),
            **{name: sum(u[name] for u in updates) / len(updates) for name in updates[0]},
            **{f"seconds/{name}": spent for name, spent in clock.wall.items()},
            **{f"cpu_seconds/{name}": spent for name, spent in clock.cpu.items()},
        }
        rows.append(row)
    return rows


# --- 6. a demonstration on a random tiny Llama --------------------------------------------------------------


def tiny_folders(directory: str | Path, hidden: int = 32, layers: int = 2, vocabulary: int = 48) -> Settings:
    """A random Llama, a policy adapter and a reward adapter with its head, as PEFT itself writes them."""
    torch.manual_seed(0)
    base, policy, reward = (str(Path(directory) / name) for name in ("base", "policy", "reward"))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **lora)).save_pretrained(policy)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora["modules_to_save"] = ["score"]
    get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **lora)).save_pretrained(reward)
    return Settings(base=base, policy=policy, reward=reward)


def demonstration(hidden: int, layers: int, vocabulary: int, **numbers) -> dict[str, list[dict]]:
    """The same run packed and padded. A reward prompt of one token, 3, stands before what is scored, 4 behind."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, vocabulary, length).tolist() for length in draw.integers(2, 20, 40)]
    rows = [draw.integers(5, vocabulary, length).tolist() for length in draw.integers(4, 60, 30)]
    replay = [(row, [0] + [1] * (len(row) - 1)) for row in rows]

    def score(numbers, answers):
        return [[3, *prompts[i], *answer, 4] for i, answer in zip(numbers, answers, strict=True)]

    with tempfile.TemporaryDirectory() as directory:
        settings = replace(tiny_folders(directory, hidden, layers, vocabulary), **numbers)
        return {
            name: train(replace(settings, packed=name == "packed"), prompts, score, replay)
            for name in ("packed", "padded")
        }


if __name__ == "__main__":
    runs = demonstration(
        hidden=128, layers=4, vocabulary=512, steps=3, prompts_per_step=32, max_new_tokens=256, top_p=1.0,
        end_ids=(2, 5, 6, 7), mini_batches=2, critic_warmup=1, lr=1e-4, critic_lr=5e-4, tokens_per_pass=4096,
    )  # fmt: skip
    for packed, padded in zip(runs["packed"], runs["padded"], strict=True):
        assert packed["answers"] == padded["answers"]
        for name, number in packed.items():
            if isinstance(number, float):
                print(f"step {packed['step']}  {name:24s} {number:12.6f} {padded[name]:12.6f}")
