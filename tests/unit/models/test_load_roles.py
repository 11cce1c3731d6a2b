"""The four roles of PPO: what they share, what they start from, and who is trained."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tuner.config import PPO, LoRA, Model, Prompts, Sampling
from tuner.data.batch import make_batch
from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.models.dropout import switch_off_dropout
from tuner.models.forward import scores, token_logprobs, values
from tuner.models.generate import generate
from tuner.models.load import load_model
from tuner.models.load_roles import PolicyModels, PolicyRoles, load_policy_roles
from tuner.models.reward_record import RewardRecord, write_reward_record
from tuner.models.save import save_model
from tuner.models.scorer import ScoreRequest, open_scorer, prompt_of, score_sequences
from tuner.stages.rl.models import policy_models

CPU = torch.device("cpu")
LORA = LoRA(r=4, alpha=8)
EMBEDDING = LORA.model_copy(update={"train_whole": ("embed_tokens",)})
LANGUAGE_HEAD = LORA.model_copy(update={"train_whole": ("lm_head",)})
NAMES = ("policy", "reference", "critic", "reward")
REFUSED = 'differ, so the critic cannot start from the reward model; write critic_from="policy"'

Make = Callable[..., str]
Load = Callable[..., PolicyRoles]


PPO_ROLES = ("reference", "critic")


def noise(model: torch.nn.Module, seed: int, scale: float = 0.02) -> None:
    """Move what is trained: no score is 0, no role like another."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=draw) * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Make:
    """A model folder as a run leaves it, its weights drawn and not learned; made once."""
    root, folders = tmp_path_factory.mktemp("folders"), {}

    def make(
        head: str,
        lora: LoRA | None = LORA,
        base: str = "tuner:tiny",
        quantization: str | None = None,
        precision: str = "fp32",
        template: str = "internlm2",
    ) -> str:
        key = (head, str(lora), base, quantization, precision, template)
        if key in folders:
            return folders[key]
        place = root / str(len(folders))
        place.mkdir()
        loaded = load_model(
            Model(path=base, quantization=quantization),
            precision=precision,
            device=CPU,
            adapter=lora,
            head=head,
        )
        noise(loaded.model, seed=1 if head == "score" else 2)
        loaded.tokenizer.chat_template = Template(template, loaded.tokenizer).source
        save_model(loaded, place)
        if head == "score":
            record = RewardRecord("[UNUSED_TOKEN_130]", {"brief": ("Be brief.", "Only short answers win.")})
            write_reward_record(place, record)
        folders[key] = str(place)
        return folders[key]

    return make


@pytest.fixture
def load(folder) -> Load:
    """The roles of a config with some values changed: by default four adapters on one base."""

    def loaded(**changes) -> PolicyRoles:
        config = PPO(**{
            "policy": Model(path=folder("language") if "policy" not in changes else "none"),
            "reward": folder("score") if "reward" not in changes else "none",
            "prompts": Prompts(files=("tuner:sums/train.jsonl",), template="internlm2", max_length=48),
            "sampling": Sampling(max_new_tokens=8),
            "tokens_per_pass": 256,
            "precision": "fp32",
            "gradient_checkpointing": False,
        } | {name: Model(path=value) if name == "policy" else value for name, value in changes.items()})  # fmt: skip
        autocast = config.precision == "bf16"
        return load_policy_roles(
            policy_models(config, ("reference", "critic")),
            CPU,
            lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        )

    return loaded


@pytest.fixture(scope="module")
def batch():
    """Three answers, of 10, 17 and 4 tokens."""
    draw, samples = np.random.default_rng(0), []
    for length in (20, 33, 7):
        tokens = draw.integers(20, 900, length).astype(np.int32)
        samples.append((tokens, (np.arange(length) >= length // 2).astype(np.float32)))
    return make_batch(samples)


def conversations() -> list[Conversation]:
    return [
        Conversation((Turn("user", f"What is {number} + 5?"), Turn("assistant", answer)), origin="here")
        for number, answer in enumerate(["11", "It is twelve, of course!", "", "no <|im_end|> idea"])
    ]


def requests() -> list[ScoreRequest]:
    return [
        ScoreRequest(conversation, condition, prompt_of(conversation))
        for conversation in conversations()
        for condition in ("brief", None)
    ]


def scored(roles: PolicyRoles) -> np.ndarray:
    with roles.roles.role("reward") as model:
        return score_sequences(model, roles.reward_inputs["reward"].make(requests()), 64, CPU)


def logprobs(roles, name, batch, train=False) -> torch.Tensor:
    with roles.roles.role(name, train=train) as model:
        return token_logprobs(model, batch)[0].detach()


def worth(roles, batch) -> torch.Tensor:
    with roles.roles.role("critic") as model:
        return values(model, batch)


def gradients(roles: PolicyRoles, name: str, batch) -> list[torch.Tensor]:
    """Of a role's trained weights after one backward pass."""
    with roles.roles.role(name, train=True) as model:
        loss = values(model, batch) if name == "critic" else token_logprobs(model, batch)[0]
        loss.sum().backward()
    of_role = [weight.grad for weight in roles.roles.trained(name).values()]
    for weight in roles.roles.trained(name).values():
        weight.grad = None
    return of_role


def models(roles: PolicyRoles) -> dict[int, torch.nn.Module]:
    return {id(roles.roles[name].loaded.model): roles.roles[name].loaded.model for name in NAMES}


LAYOUTS = {
    "shared": {},
    "critic-from-policy": {"critic_from": "policy"},
    "separate": {"roles": "separate"},
    "separate-critic-from-policy": {"roles": "separate", "critic_from": "policy"},
}


@pytest.fixture(params=LAYOUTS)
def roles(request, load) -> PolicyRoles:
    return load(**LAYOUTS[request.param])


# What is shared


def test_one_base_lies_in_memory_once(load):
    roles = load()
    (model,) = models(roles).values()
    base = load_model(Model(path="tuner:tiny"), precision="fp32", device=CPU).model
    plain = sum(weight.numel() for weight in base.parameters())
    adapter = sum(weight.numel() for name, weight in roles.roles.trained("policy").items() if "lora" in name)
    assert sum(weight.numel() for weight in model.parameters()) == plain + 4 * adapter
    heads = [roles.roles[name].head for name in NAMES]
    assert [head is not None for head in heads] == [False, False, True, True]
    assert heads[2].weight.data_ptr() != heads[3].weight.data_ptr()


def test_separate_models_share_no_weight(load):
    roles = load(roles="separate")
    assert len(models(roles)) == 4
    places = Counter(
        weight.data_ptr() for model in models(roles).values() for weight in set(model.parameters())
    )
    assert set(places.values()) == {1}


def test_a_policy_and_a_reward_model_of_two_bases_make_two_models(load, folder):
    """Policy QLoRA on a 4-bit base, the reward model with all its weights trained."""
    policy = folder("language", quantization="nf4", precision="bf16")
    roles = load(policy=policy, reward=folder("score", lora=None), precision="bf16")
    assert len(models(roles)) == 2
    policy, reward = (roles.roles[name].loaded for name in ("policy", "reward"))
    assert roles.roles["reference"].loaded is policy
    assert roles.roles["critic"].loaded is reward
    assert (policy.base.quantization, reward.base.quantization) == ("nf4", None)


def test_a_base_in_another_precision_is_another_base(load, folder):
    """The adapter of the reward model was trained on what is held in fp32, not on 4-bit codes."""
    policy = folder("language", quantization="nf4", precision="bf16")
    assert len(models(load(policy=policy, precision="bf16"))) == 2


# What roles start from


def test_the_reference_is_the_policy_as_it_starts_and_stays(roles, batch):
    before = logprobs(roles, "policy", batch)
    assert torch.equal(logprobs(roles, "reference", batch), before)
    assert torch.equal(logprobs(roles, "policy", batch, train=True), before)
    for weight in (*roles.roles.trained("policy").values(), *roles.roles.trained("critic").values()):
        weight.data.add_(0.01)
    assert not torch.equal(logprobs(roles, "policy", batch), before)
    assert torch.equal(logprobs(roles, "reference", batch), before)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["fresh-adapter", "nf4", "bf16", "all-weights"])
def test_the_reference_is_the_policy_to_the_last_bit(load, folder, batch, layout, kind):
    changes = {
        "fresh-adapter": {"policy": "tuner:tiny", "adapter": LORA},
        "nf4": {
            "policy": folder("language", quantization="nf4", precision="bf16"),
            "reward": folder("score", quantization="nf4", precision="bf16"),
            "precision": "bf16",
        },
        "bf16": {
            "policy": folder("language", precision="bf16"),
            "reward": folder("score", precision="bf16"),
            "precision": "bf16",
        },
        "all-weights": {"policy": folder("language", lora=None), "reward": folder("score", lora=None)},
    }[kind]
    if kind == "all-weights" and layout == "shared":
        with pytest.raises(UserError, match=r'trains adapters on a frozen base.*write roles="separate"'):
            load(roles=layout, **changes)
        return
    roles = load(roles=layout, **changes)
    ours, theirs = (logprobs(roles, name, batch) for name in ("policy", "reference"))
    assert torch.equal(ours, theirs)
    assert torch.equal(logprobs(roles, "policy", batch, train=True), ours)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("whole", [EMBEDDING, LANGUAGE_HEAD], ids=["embedding", "head"])
def test_modules_trained_whole_belong_to_the_reference_too(load, folder, batch, whole, layout):
    roles = load(policy=folder("language", lora=whole), roles=layout)
    assert torch.equal(logprobs(roles, "policy", batch), logprobs(roles, "reference", batch))
    name = whole.train_whole[0]
    changed = [
        weight for key, weight in roles.roles.trained("policy").items() if name in key and "lora" not in key
    ]
    assert len(changed) == 1
    before = logprobs(roles, "reference", batch), scored(roles), worth(roles, batch)
    changed[0].data.mul_(1.1)
    assert not torch.equal(logprobs(roles, "policy", batch), before[0])
    assert torch.equal(logprobs(roles, "reference", batch), before[0])
    assert np.array_equal(scored(roles), before[1])
    assert torch.equal(worth(roles, batch), before[2])


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_modules_trained_whole_in_bf16(load, folder, batch, layout):
    policy = folder("language", lora=EMBEDDING, precision="bf16")
    roles = load(policy=policy, reward=folder("score", precision="bf16"), precision="bf16", roles=layout)
    assert torch.equal(logprobs(roles, "policy", batch), logprobs(roles, "reference", batch))


def test_all_weights_in_bf16(load, folder, batch):
    """The policy's are held in fp32 while they are trained, so the reference's must compute as they do."""
    policy = folder("language", lora=None)
    reward = folder("score", lora=None)
    roles = load(policy=policy, reward=reward, precision="bf16", roles="separate")
    assert torch.equal(logprobs(roles, "policy", batch), logprobs(roles, "reference", batch))


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_critic_is_the_reward_model_with_a_head_of_zeros(load, batch, layout):
    roles = load(roles=layout)
    assert not worth(roles, batch).any()
    with roles.roles.role("reward") as model:
        before = scores(model, batch)
    assert before.any()
    (head,) = [weight for name, weight in roles.roles.trained("critic").items() if ".score." in f".{name}"]
    reward = roles.roles["reward"]
    weights = reward.head.weight if reward.head is not None else reward.loaded.transformer.score.weight
    head.data.copy_(weights)
    with roles.roles.role("critic") as model:
        assert torch.equal(scores(model, batch), before)


def test_a_critic_from_the_policy_has_its_hidden_states(load, batch):
    for layout in ("shared", "separate"):
        roles = load(roles=layout, critic_from="policy")
        assert not worth(roles, batch).any()
        with roles.roles.role("policy") as model:
            expected = hidden(model, batch)
        with roles.roles.role("critic") as model:
            assert torch.equal(hidden(model, batch), expected)


def hidden(model, batch):
    from tuner.models.forward import hidden_states

    return hidden_states(model, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_the_reward_model_alone(load, folder, layout):
    scorer = open_scorer(folder("score"))
    expected = scorer.score_requests(requests())
    assert len(set(expected.tolist())) == len(expected)  # every answer and condition tells
    roles = load(**LAYOUTS[layout])
    assert scored(roles).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    for name in ("policy", "critic"):
        gradients(roles, name, make_batch([(np.arange(20, 40, dtype=np.int32), np.ones(20, np.float32))]))
    before = scored(roles)
    for name in ("policy", "critic"):
        for weight in roles.roles.trained(name).values():
            weight.data.add_(0.1)
    assert np.array_equal(scored(roles), before)


def test_shared_and_separate_say_the_same(load, batch):
    shared, separate = load(), load(roles="separate")
    for name in ("policy", "reference"):
        assert torch.allclose(logprobs(shared, name, batch), logprobs(separate, name, batch), atol=1e-5)
    assert scored(shared).tolist() == pytest.approx(scored(separate).tolist(), rel=1e-5)
    for name in ("policy", "critic"):
        pairs = zip(gradients(shared, name, batch), gradients(separate, name, batch), strict=True)
        assert all(torch.allclose(ours, their, rtol=1e-3, atol=1e-5) for ours, their in pairs)


def test_a_critic_on_a_whole_reward_model_gets_an_adapter(load, folder, batch):
    policy = folder("language", quantization="nf4", precision="bf16")
    roles = load(policy=policy, reward=folder("score", lora=None), precision="bf16")
    assert not worth(roles, batch).any()
    before = scored(roles)
    assert before.any()
    assert any("lora" in name for name in roles.roles.trained("critic"))
    for weight in roles.roles.trained("critic").values():
        weight.data.add_(0.1)
    assert worth(roles, batch).any()
    assert np.array_equal(scored(roles), before)


# Who is trained


def test_policy_and_critic_alone_are_trained(roles):
    trained = {id(weight) for name in ("policy", "critic") for weight in roles.roles.trained(name).values()}
    of_models = {
        id(weight)
        for model in models(roles).values()
        for weight in model.parameters()
        if weight.requires_grad
    }
    heads = {id(roles.roles[name].head.weight) for name in NAMES if roles.roles[name].head is not None}
    assert trained - heads == of_models
    both = [set(map(id, roles.roles.trained(name).values())) for name in ("policy", "critic")]
    assert both[0]
    assert both[1]
    assert not both[0] & both[1]
    for name in ("reference", "reward"):
        assert not roles.roles.trained(name)


def test_switching_never_changes_who_is_trained(roles, batch):
    def state():
        return {
            (place, name): weight.requires_grad
            for place, model in enumerate(models(roles).values())
            for name, weight in model.named_parameters()
        }

    before = state()
    for name in (*NAMES, *reversed(NAMES)):
        for train in (False, True):
            with roles.roles.role(name, train=train) as model:
                assert state() == before
                hidden(model, batch)
            assert state() == before


def test_a_role_learns_alone(roles, batch):
    """A backward pass of the policy reaches its weights and no one else's; so of the critic."""
    all_weights = {
        id(weight): weight for model in models(roles).values() for weight in model.parameters()
    } | {id(weight): weight for name in NAMES for weight in roles.roles.trained(name).values()}
    for name in ("policy", "critic"):
        with roles.roles.role(name, train=True) as model:
            loss = values(model, batch) if name == "critic" else token_logprobs(model, batch)[0]
            loss.sum().backward()
        trained = {id(weight) for weight in roles.roles.trained(name).values()}
        reached = {key for key, weight in all_weights.items() if weight.grad is not None}
        assert reached == trained
        for weight in all_weights.values():
            weight.grad = None


@pytest.mark.parametrize("reward_kind", ["same", "lora", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_weights_are_in_fp32(load, folder, layout, reward_kind):
    """In bf16 a step of 1e-6 would be lost."""
    policy = folder("language", quantization="nf4", precision="bf16")
    reward = {
        "same": folder("score", quantization="nf4", precision="bf16"),
        "lora": folder("score"),
        "whole": folder("score", lora=None),
    }[reward_kind]
    roles = load(policy=policy, reward=reward, precision="bf16", **LAYOUTS[layout])
    for name in ("policy", "critic"):
        assert {weight.dtype for weight in roles.roles.trained(name).values()} == {torch.float32}


@pytest.mark.parametrize("start", ["policy", "reward"])
def test_a_critic_with_modules_trained_whole_is_in_fp32(load, folder, start):
    policy = folder("language", lora=EMBEDDING, precision="bf16")
    reward = folder("score", lora=EMBEDDING, precision="bf16")
    roles = load(policy=policy, reward=reward, precision="bf16", critic_from=start)
    assert {weight.dtype for weight in roles.roles.trained("critic").values()} == {torch.float32}


def test_a_saved_dropout_is_off(load, folder, batch):
    dropped = LORA.model_copy(update={"dropout": 0.5})
    for layout in ("shared", "separate"):
        roles = load(
            policy=folder("language", lora=dropped), reward=folder("score", lora=dropped), roles=layout
        )
        assert torch.equal(logprobs(roles, "policy", batch, train=True), logprobs(roles, "policy", batch))
        roles.roles["critic"].trained()  # and a critic's values do not change from pass to pass
        noise_of_head(roles)
        with roles.roles.role("critic", train=True) as model:
            trained = values(model, batch).detach()
        assert torch.equal(trained, worth(roles, batch))


def noise_of_head(roles: PolicyRoles) -> None:
    for name, weight in roles.roles.trained("critic").items():
        if ".score." in f".{name}":
            weight.data.fill_(0.1)


def test_checkpointing_leaves_the_gradients_as_they_are(load, batch):
    for name in ("policy", "critic"):
        off, on = load(), load(gradient_checkpointing=True)
        noise_of_head(off)
        noise_of_head(on)
        pairs = zip(gradients(off, name, batch), gradients(on, name, batch), strict=True)
        assert all(torch.equal(ours, their) for ours, their in pairs)


def test_generating_and_scoring_do_not_disturb_training_on_four_bits(load, folder, batch):
    """CPUs with AVX512-BF16 repack 4-bit weights in passes without gradients, for good: so a model that has never
    made such a pass (loading the roles makes some) says what the gradients are."""
    changes = {"quantization": "nf4", "precision": "bf16"}
    policy, reward = folder("language", **changes), folder("score", **changes)
    expected = {
        "policy": untouched_gradients(policy, "language", batch),
        "critic": untouched_gradients(reward, "score", batch),
    }
    roles = load(policy=policy, reward=reward, precision="bf16")
    noise_of_head(roles)
    with roles.roles.role("policy") as model:
        generate(model, [[1, 50, 60], [1, 70]], max_new_tokens=4, end_ids=[2])
    scored(roles)
    logprobs(roles, "reference", batch)
    worth(roles, batch)
    for name, gradients_before in expected.items():
        after = gradients(roles, name, batch)
        assert len(after) == len(gradients_before)
        assert all(torch.equal(ours, their) for ours, their in zip(gradients_before, after, strict=True))


def untouched_gradients(path: str, head: str, batch) -> list[torch.Tensor]:
    """Of a model loaded alone, in its first pass."""
    loaded = load_model(Model(path=path), precision="bf16", device=CPU, head=head)
    loaded.model.train()
    switch_off_dropout(loaded.model)
    trained = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    last = [name for name in trained if ".score." in name]
    for name in last:
        trained[name].data.fill_(0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = values(loaded.model, batch) if head == "score" else token_logprobs(loaded.model, batch)[0]
        loss.sum().backward()
    return [trained[name].grad for name in [*(name for name in trained if name not in last), *last]]


# What is refused


def test_a_reward_model_of_another_template(load, folder):
    reward = folder("score", template="alpaca")
    with pytest.raises(UserError, match=f"the chat templates of policy and reward model {REFUSED}"):
        load(reward=reward)
    scorer = open_scorer(reward)
    assert scored(load(reward=reward, critic_from="policy")).tolist() == pytest.approx(
        scorer.score_requests(requests()).tolist(), rel=1e-5
    )


def test_a_reward_model_of_another_tokenizer(load, folder, internlm2_folder):
    """Scored through the text: what `tuner score` says."""
    reward = folder("score", base=str(internlm2_folder))
    with pytest.raises(UserError, match=f"the tokenizers of policy and reward model {REFUSED}"):
        load(reward=reward)
    scorer = open_scorer(reward)
    for layout in ("shared", "separate"):
        roles = load(reward=reward, critic_from="policy", roles=layout)
        assert scored(roles).tolist() == pytest.approx(scorer.score_requests(requests()).tolist(), rel=1e-5)


def test_a_language_model_scores_nothing(load, folder):
    with pytest.raises(UserError, match="this is no reward model: it has no scalar head"):
        load(reward=folder("language"))


def test_a_reward_model_is_no_policy(load, folder):
    with pytest.raises(UserError, match="this is a reward model, and a language model is needed"):
        load(policy=folder("score"))


def test_four_bits_of_another_precision(load, folder):
    """A reward model's codes are of weights rounded to what it was trained in: others are another base."""
    policy = folder("language", quantization="nf4", precision="bf16")
    reward = folder("score", quantization="nf4", precision="fp32")
    for layout in ("shared", "separate"):
        with pytest.raises(UserError, match=r"was trained on a base held in fp32; write precision=fp32"):
            load(policy=policy, reward=reward, precision="bf16", roles=layout)
    assert np.ptp(scored(load(reward=reward, policy="tuner:tiny", adapter=LORA))) > 0  # as it was trained
    load(policy=policy, reward=folder("score"), precision="bf16")  # whole weights may be rounded


# Some of the roles, and roles without weights


def parts(folder, **changes) -> PolicyModels:
    values = {
        "policy": Model(path=folder("language")),
        "reference": None,
        "reward": Model(path=folder("score")),
        "adapter": None,
        "critic_adapter": None,
        "critic_from": "reward",
        "layout": "shared",
        "roles": frozenset({"reference", "critic", "reward"}),
        "template": "internlm2",
        "precision": "fp32",
        "seed": 0,
        "gradient_checkpointing": False,
    }
    return PolicyModels(**values | changes)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize(
    ("needed", "with_reward"),
    [((), False), (("reference",), False), (("reward",), True), (("reference", "reward"), True)],
)
def test_only_the_roles_needed_are_loaded(folder, load, batch, layout, needed, with_reward):
    reward = Model(path=folder("score")) if with_reward else None
    models = parts(folder, roles=frozenset(needed), reward=reward, layout=layout)
    loaded = load_policy_roles(models, CPU, nullcontext)
    assert list(loaded.roles) == ["policy", *needed]
    assert list(loaded.reward_inputs) == (["reward"] if with_reward else [])
    assert set(loaded.fingerprints) == {"policy", "reward"} if with_reward else {"policy"}
    full = load(roles=layout)
    assert torch.equal(logprobs(loaded, "policy", batch), logprobs(full, "policy", batch))
    if with_reward:
        assert np.array_equal(scored(loaded), scored(full))


def test_a_policy_without_an_adapter_shares_with_no_one(folder):
    policy = Model(path=folder("language", lora=None))
    models = parts(folder, policy=policy, reward=None, roles=frozenset())
    assert list(load_policy_roles(models, CPU, nullcontext).roles) == ["policy"]
    alone = parts(folder, policy=policy, roles=frozenset({"reward"}))
    assert len(load_policy_roles(alone, CPU, nullcontext).roles.models) == 2
    with pytest.raises(UserError, match='write roles="separate"'):
        load_policy_roles(parts(folder, policy=policy, roles=frozenset({"reference"})), CPU, nullcontext)


# A reference of its own


@pytest.fixture(scope="module")
def earlier(folder, tmp_path_factory) -> str:
    """A policy of another adapter on the same base."""
    place = tmp_path_factory.mktemp("earlier")
    loaded = load_model(Model(path=folder("language")), precision="fp32", device=CPU)
    noise(loaded.model, seed=3, scale=0.05)
    save_model(loaded, place)
    return str(place)


REFERENCES = {
    "an adapter on the policy's base": (lambda folder, earlier: earlier, 1),
    "the policy's base": (lambda folder, earlier: "tuner:tiny", 1),
    "another base": (lambda folder, earlier: folder("language", lora=None), 2),
    "an adapter that trains a module whole": (lambda folder, earlier: folder("language", EMBEDDING), 1),
}


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_a_reference_of_its_own_is_that_model(folder, earlier, batch, kind, layout):
    where, shared_models = REFERENCES[kind]
    path = where(folder, earlier)
    roles = frozenset({"reference", "critic", "reward"})
    models = parts(folder, reference=Model(path=path), roles=roles, layout=layout)
    loaded = load_policy_roles(models, CPU, nullcontext)
    assert len(loaded.roles.models) == (shared_models if layout == "shared" else 4)
    alone = load_model(Model(path=path), precision="fp32", device=CPU, train=False)
    expected = token_logprobs(alone.model, batch)[0].detach()
    assert torch.equal(logprobs(loaded, "reference", batch), expected)
    plain = load_policy_roles(parts(folder, layout=layout), CPU, nullcontext)
    for role in ("policy", "reference"):
        assert torch.equal(logprobs(loaded, "policy", batch), logprobs(plain, role, batch))
    assert not torch.equal(logprobs(loaded, "policy", batch), expected)
    assert not loaded.roles.trained("reference")
    assert loaded.roles.trained("policy").keys() == plain.roles.trained("policy").keys()
    assert set(loaded.fingerprints) == {"policy", "reference", "reward"}
    meta = load_policy_roles(models, torch.device("meta"), nullcontext).roles
    assert [shapes(one) for one in meta.models] == [shapes(one) for one in loaded.roles.models]


def test_a_reference_reads_the_policys_tokens(folder, internlm2_folder):
    needed = frozenset({"reference"})
    other = parts(folder, reference=Model(path=str(internlm2_folder)), reward=None, roles=needed)
    with pytest.raises(UserError, match=r"reference: the tokenizer of .* is not that of the policy"):
        load_policy_roles(other, CPU, nullcontext)
    reward = parts(folder, reference=Model(path=folder("score")), reward=None, roles=needed)
    with pytest.raises(UserError, match="this is a reward model, and a language model is needed"):
        load_policy_roles(reward, CPU, nullcontext)


def test_a_base_that_the_policys_adapter_changes_is_no_reference(folder, tmp_path):
    biased = Path(shutil.copytree(folder("language"), tmp_path / "biased"))
    settings = json.loads((biased / "adapter_config.json").read_text())
    (biased / "adapter_config.json").write_text(json.dumps(settings | {"bias": "lora_only"}))
    needed = frozenset({"reference"})
    models = parts(
        folder, policy=Model(path=str(biased)), reference=Model(path="tuner:tiny"), reward=None, roles=needed
    )
    with pytest.raises(UserError, match='changes it for the others; write roles="separate"'):
        load_policy_roles(models, CPU, nullcontext)


def test_a_critic_needs_a_model_to_start_from(folder):
    with pytest.raises(ValueError, match="starts from the reward model"):
        parts(folder, reward=None)


@pytest.mark.parametrize("reward_kind", ["same", "lora", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_without_weights_are_those_with(folder, layout, reward_kind):
    """Names, shapes, dtypes and who is trained: what memory is counted on."""
    reward = {
        "same": folder("score"),
        "lora": folder("score", precision="bf16"),
        "whole": folder("score", lora=None),
    }
    changes = {"roles": "shared", "critic_from": "reward"} | LAYOUTS[layout]
    models = parts(
        folder,
        reward=Model(path=reward[reward_kind]),
        layout=changes["roles"],
        critic_from=changes["critic_from"],
        critic_adapter=LORA if changes["roles"] == "separate" and reward_kind == "whole" else None,
    )
    real, meta = (
        load_policy_roles(models, device, nullcontext).roles for device in (CPU, torch.device("meta"))
    )
    assert [shapes(loaded) for loaded in meta.models] == [shapes(loaded) for loaded in real.models]
    assert all(weight.is_meta for loaded in meta.models for weight in loaded.model.parameters())
    assert [tuple(head.weight.shape) for head in meta.heads] == [
        tuple(head.weight.shape) for head in real.heads
    ]
    assert list(meta) == list(real)


def shapes(loaded):
    return {
        name: (tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in loaded.model.named_parameters()
    }


# Several reward models

SECOND = LoRA(r=6, alpha=8)
"""Of another reward model's adapter on the same base: other weights."""


def scored_by_all(roles: PolicyRoles) -> dict[str, list[float]]:
    found = {}
    for name, inputs in roles.reward_inputs.items():
        with roles.roles.role(name) as model:
            found[name] = score_sequences(model, inputs.make(requests()), 64, CPU).tolist()
    return found


def trained_names(roles: PolicyRoles) -> set[str]:
    return {
        name
        for loaded in roles.roles.models
        for name, weight in loaded.model.named_parameters()
        if weight.requires_grad
    }


ENSEMBLES = {
    # changes of the config, how the two reward models are held, and on how many models all roles stand
    "on-the-policys-base": ({}, {}, {}, 1),
    "on-another-base": ({}, {"precision": "bf16"}, {"precision": "bf16"}, 2),
    "critic-beside": ({"critic_from": "reward"}, {"precision": "bf16"}, {"precision": "bf16"}, 2),
    "on-two-bases": ({}, {}, {"precision": "bf16"}, 2),
    "whole": ({}, {"lora": None}, {}, 2),
    "separate": ({"roles": "separate"}, {}, {}, 5),
}


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_further_reward_models_share_bases_and_score_as_alone(load, folder, kind):
    changes, first, second, num_models = ENSEMBLES[kind]
    paths = [folder("score", **first), folder("score", **({"lora": SECOND} | second))]
    one = load(reward=paths[0], **{"critic_from": "policy"} | changes)
    both = load(reward=paths[0], further_rewards=(paths[1],), **{"critic_from": "policy"} | changes)
    assert list(both.roles) == ["policy", "reference", "critic", "reward", "reward_2"]
    assert len(both.roles.models) == num_models
    assert trained_names(both) == trained_names(one)
    assert set(both.fingerprints) == {"policy", "reward", "reward_2"}
    other = load(reward=paths[1], **{"critic_from": "policy"} | changes)
    scores = scored_by_all(both)
    assert scores["reward"] == pytest.approx(scored_by_all(one)["reward"], rel=1e-5)
    assert scores["reward_2"] == pytest.approx(scored_by_all(other)["reward"], rel=1e-5)
    assert scores["reward"] != pytest.approx(scores["reward_2"], rel=1e-2)
