"""LLaMA-Factory configs: what maps to what, and what is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.importers.conftest import CONFIGS
from tuner.config import DPO, KTO, PPO, SFT, AdaptiveKL, RewardModel
from tuner.errors import UserError
from tuner.importers.import_file import Imported, import_config

Import = Callable[..., Imported]
SFT_CONFIG = """
model_name_or_path: Qwen/Qwen3-4B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
dataset: identity,alpaca_en_demo
template: qwen3_nothink
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
"""
INFO = {
    "plain": {"file_name": "plain.json"},
    "renamed": {
        "hf_hub_url": "org/renamed",
        "columns": {"prompt": "question", "response": "reply", "system": "system_prompt"},
        "subset": "en",
        "split": "train_sft",
        "num_samples": 10,
    },
    "turns": {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "agent"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
    "code": {"hf_hub_url": "org/code", "columns": {"prompt": "content"}},
}


@pytest.fixture
def _info() -> None:
    """A folder `data` with a dataset_info.json."""
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO))


def test_the_values_of_an_sft_config_are_carried(import_text: Import) -> None:
    imported = import_text(
        SFT_CONFIG
        + """
cutoff_len: 1024
learning_rate: 1e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
weight_decay: 0.01
adam_beta2: 0.95
optim: paged_adamw_8bit
quantization_bit: 4
lora_target: q_proj,v_proj
additional_target: embed_tokens
max_samples: 100
val_size: 0.05
eval_steps: 20
eval_strategy: steps
save_steps: 30
save_total_limit: 3
seed: 7
mask_history: true
neftune_noise_alpha: 5
"""
    )
    config = imported.config
    assert isinstance(config, SFT)
    assert (config.model.path, config.model.quantization) == ("Qwen/Qwen3-4B", "nf4")
    assert config.adapter is not None
    # lora_alpha is twice the rank by default
    assert (config.adapter.r, config.adapter.alpha) == (8, 16)
    assert (config.adapter.targets, config.adapter.train_whole) == (("q_proj", "v_proj"), ("embed_tokens",))
    assert config.data.kind == "chat"
    assert (config.data.template, config.data.learn, config.data.limit) == ("qwen", "last", 100)
    assert (config.data.max_length, config.data.too_long) == (1024, "cut")
    assert config.data.split.validation == 0.05
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-4, (0.9, 0.95))
    assert (config.optimizer.bits, config.optimizer.paged, config.optimizer.weight_decay) == (8, True, 0.01)
    assert (config.schedule.kind, config.schedule.warmup, config.epochs, config.seed) == ("cosine", 0.1, 2, 7)
    assert (config.checkpoint.every, config.checkpoint.keep, config.evaluation.every) == (30, 3, 20)
    assert (config.tokens_per_pass, config.tokens_per_step) == (2 * 1024, 8 * 1024)
    assert imported.report.lost == {"neftune_noise_alpha": "no noise is added to embeddings"}


def test_what_is_not_written_has_the_trainers_defaults(import_text: Import) -> None:
    config = import_text(
        "model_name_or_path: m\nstage: sft\ndo_train: true\ndataset: a\nfinetuning_type: full\n"
    ).config
    assert isinstance(config, SFT)
    assert config.adapter is None
    assert (config.optimizer.lr, config.epochs, config.schedule.kind, config.schedule.warmup) == (
        5e-5,
        3,
        "linear",
        0,
    )
    assert (config.data.max_length, config.tokens_per_step, config.max_grad_norm) == (2048, 8 * 2048, 1.0)
    assert config.checkpoint.every == 500


@pytest.mark.usefixtures("_info")
def test_datasets_are_looked_up(import_text: Import) -> None:
    imported = import_text(SFT_CONFIG.replace("identity,alpaca_en_demo", "plain,renamed,turns"))
    plain, renamed, turns = imported.config.data.sources
    assert (plain.path, plain.shape) == ("data/plain.json", None)
    assert (renamed.path, renamed.subset, renamed.split, renamed.limit) == (
        "org/renamed",
        "en",
        "train_sft",
        10,
    )
    names: dict[str, Callable[[object], object]] = {}
    exec(imported.text, names)
    row = {"question": "q", "reply": "r", "system_prompt": "s"}
    assert names["renamed"](row) == {"instruction": "q", "output": "r", "system": "s"}
    dialog = {"dialog": [{"who": "customer", "says": "hi"}, {"who": "agent", "says": "hello"}]}
    assert names["turns"](dialog) == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    }
    assert turns.shape is not None


@pytest.mark.usefixtures("_info")
def test_datasets_are_looked_up_from_a_folder_above_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("examples/train_lora").resolve()
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(SFT_CONFIG.replace("identity,alpaca_en_demo", "plain"))
    data = Path("data").resolve()
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = import_config(folder / "x.yaml", Path("mine.py")).config
    assert config.model_dump()["data"]["files"][0]["path"] == str(data / "plain.json")


def test_without_dataset_info_the_guess_is_told(import_text: Import) -> None:
    imported = import_text(SFT_CONFIG)
    assert [source.path for source in imported.config.data.sources] == [
        "data/identity.json",
        "data/alpaca_en_demo.json",
    ]
    assert "dataset_info.json" in imported.report.decided["data.files"]
    online = import_text(SFT_CONFIG + "dataset_dir: ONLINE\n")
    assert [source.path for source in online.config.data.sources] == ["identity", "alpaca_en_demo"]


@pytest.mark.usefixtures("_info")
def test_shares_of_interleaved_datasets(import_text: Import) -> None:
    text = SFT_CONFIG.replace("identity,alpaca_en_demo", "plain,renamed")
    mixed = import_text(text + "mix_strategy: interleave_under\ninterleave_probs: 0.25,0.75\n")
    assert [source.share for source in mixed.config.data.sources] == [0.25, 0.75]
    unweighted = import_text(text + "mix_strategy: interleave_under\n")
    assert "mix_strategy" in unweighted.report.lost


@pytest.mark.usefixtures("_info")
def test_pre_training_packs(import_text: Import) -> None:
    config = import_text(
        SFT_CONFIG.replace("stage: sft", "stage: pt").replace("identity,alpaca_en_demo", "code"), devices=4
    ).config
    assert config.data.kind == "text"
    assert config.tokens_per_step == 4 * 8 * 2048
    assert config.data.sources[0].shape == "mine.py:code"


@pytest.mark.usefixtures("_info")
def test_preferences(import_text: Import) -> None:
    text = SFT_CONFIG.replace("identity,alpaca_en_demo", "pairs")
    reward = import_text(text.replace("stage: sft", "stage: rm")).config
    assert isinstance(reward, RewardModel)
    assert (reward.loss.gamma, reward.loss.barrier, reward.reward_token) == (0, 0, None)
    assert (reward.tokens_per_pass, reward.tokens_per_step) == (2 * 2 * 2048, 2 * 8 * 2048)
    assert reward.data.sources[0].shape is None
    dpo = import_text(
        text.replace("stage: sft", "stage: dpo") + "pref_loss: ipo\npref_beta: 0.2\npref_ftx: 0.3\n"
    ).config
    assert isinstance(dpo, DPO)
    assert (dpo.loss, dpo.beta, dpo.nll_weight, dpo.pairs_per_step, dpo.pairs_per_pass) == (
        "ipo",
        0.2,
        0.3,
        8,
        2,
    )
    kto = import_text(text.replace("stage: sft", "stage: kto") + "kto_rejected_weight: 0.5\n").config
    assert isinstance(kto, KTO)
    assert (kto.undesirable_weight, kto.answers_per_step, kto.answers_per_pass) == (0.5, 8, 2)


@pytest.mark.usefixtures("_info")
def test_what_trl_and_preferences_lack_is_told(import_text: Import) -> None:
    text = SFT_CONFIG.replace("identity,alpaca_en_demo", "pairs").replace("stage: sft", "stage: dpo")
    lost = import_text(text.replace(": lora", ": freeze") + "default_system: Be kind.\n").report.lost
    assert {"finetuning_type", "default_system"} <= lost.keys()
    text = SFT_CONFIG.replace("identity,alpaca_en_demo", "plain")
    chat = import_text(text + "default_system: Be kind.\n").config
    assert isinstance(chat, SFT)
    assert chat.data.kind == "chat"
    assert chat.data.system == "Be kind."


def test_kto_in_passes_of_one_answer_takes_two(import_text: Import) -> None:
    text = SFT_CONFIG.replace("stage: sft", "stage: kto").replace("batch_size: 2", "batch_size: 1")
    config = import_text(text.replace("steps: 4", "steps: 3")).config
    assert isinstance(config, KTO)
    assert (config.answers_per_step, config.answers_per_pass) == (4, 2)


@pytest.mark.parametrize(("loss", "weight"), [("orpo", 1.0), ("simpo", 0.0)])
def test_losses_without_counterpart_are_dpo_with_a_word_on_it(
    import_text: Import, loss: str, weight: float
) -> None:
    imported = import_text(SFT_CONFIG.replace("stage: sft", "stage: dpo") + f"pref_loss: {loss}\n")
    assert isinstance(imported.config, DPO)
    assert imported.config.nll_weight == weight
    assert loss in imported.report.lost["pref_loss"]
    pair = import_text(SFT_CONFIG.replace("stage: sft", "stage: dpo") + "pref_loss: kto_pair\n")
    assert isinstance(pair.config, KTO)


def test_ppo(import_text: Import) -> None:
    imported = import_text(
        SFT_CONFIG.replace("stage: sft", "stage: ppo")
        + "reward_model: saves/llama3/lora/reward\nmax_new_tokens: 512\ntop_k: 0\ntop_p: 0.9\nlora_dropout: 0.1\n"
    )
    config = imported.config
    assert isinstance(config, PPO)
    assert config.reward_model is not None
    assert config.reward_model.path == "runs/reward"
    assert (config.sampling.max_new_tokens, config.sampling.top_k, config.sampling.top_p) == (512, None, 0.9)
    assert (config.prompts_per_step, config.update_epochs) == (8, 4)
    assert isinstance(config.kl, AdaptiveKL)
    assert config.kl.target == 6.0
    assert config.adapter is not None
    assert config.adapter.dropout == 0
    assert "value heads" in imported.report.lost["reward_model"]


def test_freezing_and_full_precision(import_text: Import) -> None:
    frozen = import_text(
        SFT_CONFIG.replace("finetuning_type: lora", "finetuning_type: freeze")
        + "freeze_trainable_layers: 3\nbf16: false\n"
    ).config
    assert isinstance(frozen, SFT)
    assert frozen.freeze is not None
    assert (frozen.adapter, frozen.freeze.all_but_last_layers, frozen.precision) == (None, 3, "fp32")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("finetuning_type: oft", "finetuning_type"),
        ("use_galore: true", "use_galore"),
        ("deepspeed: ds_z3.json", "deepspeed"),
        ("pissa_init: true", "pissa_init"),
        ("use_dora: true", "use_dora"),
        ("optim: lomo", "optim"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type"),
        ("val_size: 500", "val_size"),
        ("adapter_name_or_path: saves/x", "adapter_name_or_path"),
        ("flying_carpet: 3", "flying_carpet"),
    ],
)
def test_what_is_lost_is_told_by_name(import_text: Import, line: str, key: str) -> None:
    text = SFT_CONFIG.replace("finetuning_type: lora\n", "") if key == "finetuning_type" else SFT_CONFIG
    assert key in import_text(f"{text}{line}\n").report.lost


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: m\nstage: xpo\ndataset: a\ndo_train: true", r"theirs\.yaml:2: stage: 'xpo' is none of"),
        ("model_name_or_path: m\nstage: sft\ndo_train: true", r"theirs\.yaml: dataset: is missing"),
        ("model_name_or_path: m\ninfer_backend: huggingface", "trains nothing"),
        ("model_name_or_path: m\nstage: sft\ndo_predict: true\neval_dataset: a", "trains nothing"),
        (SFT_CONFIG + "learning_rate: fast", r"theirs\.yaml:11: learning_rate: is 'fast', where a number"),
        (SFT_CONFIG + "bf16: true\nfp16: maybe", "where true or false"),
        (SFT_CONFIG + "cutoff_len: 1.5", "whole number"),
        (SFT_CONFIG + "cutoff_len: 1", "max_length"),
        (SFT_CONFIG + "learning_rate: -1", "lr"),
        (SFT_CONFIG + "learning_rate: 0\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}",
         r"AdamW\.lr: input should be greater than 0"),
        (SFT_CONFIG + "image_max_pixels: 262144", "images"),
        (SFT_CONFIG.replace("lora\n", "prefix\n"), r"theirs\.yaml:5: finetuning_type: 'prefix' is none of"),
        (SFT_CONFIG.replace("stage: sft", "stage: ppo"), "reward_model: is missing"),
        (SFT_CONFIG.replace("Qwen/Qwen3-4B", ""), "model_name_or_path: is empty"),
        ("model: Qwen/Qwen3-4B\ntrain_dataset: a", "no config that is known"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_at_all_gets_one_sentence(
    import_text: Import, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_text(text)


@pytest.mark.usefixtures("_info")
def test_datasets_that_cannot_be_read_get_one_sentence(import_text: Import) -> None:
    with pytest.raises(
        UserError, match=r"theirs\.yaml:7: dataset: 'nowhere' is not in data/dataset_info\.json"
    ):
        import_text(SFT_CONFIG.replace("identity,alpaca_en_demo", "nowhere"))
    with pytest.raises(UserError, match="pictures has images"):
        import_text(SFT_CONFIG.replace("identity,alpaca_en_demo", "pictures"))
    Path("data/dataset_info.json").write_text("[1]")
    with pytest.raises(UserError, match="an object of datasets"):
        import_text(SFT_CONFIG)


def test_the_whole_config_loads() -> None:
    shutil.copy(CONFIGS / "qwen3_lora_dpo.yaml", "theirs.yaml")
    imported = import_config(Path("theirs.yaml"), Path("mine.py"))
    assert isinstance(imported.config, DPO)
    assert imported.report.decided["adapter.dropout"] == "it was 0.05; TRL's DPO here has none"
    assert imported.config.tracking is not None
    assert not imported.report.lost
