"""Axolotl configs: what maps to what, and what is reported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.importers.conftest import CONFIGS
from tuner.config import DPO, KTO, SFT, RewardModel
from tuner.errors import UserError
from tuner.importers.import_file import Imported, import_config

Import = Callable[..., Imported]
HEAD = """
base_model: org/model
micro_batch_size: 2
gradient_accumulation_steps: 4
sequence_len: 1024
learning_rate: 1e-4
"""
ALPACA = "datasets:\n  - path: tatsu-lab/alpaca\n    type: alpaca\n"
CHAT = "chat_template: llama3\ndatasets:\n  - path: org/chat\n    type: chat_template\n"
PAIRS = "datasets:\n  - path: org/pairs\n    type: chatml.intel\n"


def test_the_values_of_a_qlora_config_are_carried() -> None:
    shutil.copy(CONFIGS / "llama3_qlora.yml", "theirs.yml")
    imported = import_config(Path("theirs.yml"), Path("mine.py"), devices=2)
    config = imported.config
    assert isinstance(config, SFT)
    assert (config.model.path, config.model.quantization) == ("NousResearch/Meta-Llama-3-8B", "nf4")
    assert config.adapter is not None
    assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (32, 16, 0.05)
    assert config.adapter.targets == "all-linear"
    source = config.data.sources[0]
    assert (source.path, source.split, source.limit) == ("tatsu-lab/alpaca", "train", 2000)
    assert config.data.kind == "chat"
    assert (config.data.template, config.data.too_long, config.data.split.validation) == (
        "alpaca",
        "drop",
        0.05,
    )
    assert (config.tokens_per_pass, config.tokens_per_step) == (2 * 4096, 2 * 8 * 4096)
    assert (config.optimizer.lr, config.optimizer.bits, config.optimizer.paged) == (2e-4, 8, True)
    assert (config.schedule.kind, config.schedule.warmup, config.epochs) == ("cosine", 10, 4)
    assert config.gradient_checkpointing
    assert imported.report.lost.keys() == {"saves_per_epoch", "evals_per_epoch"}
    assert {"plugins", "special_tokens.pad_token"} <= imported.report.idle.keys()


def test_what_is_not_written_has_the_trainers_defaults(import_text: Import) -> None:
    config = import_text("base_model: m\n" + ALPACA).config
    assert isinstance(config, SFT)
    assert (config.data.max_length, config.schedule.kind, config.schedule.warmup) == (512, "cosine", 0.03)
    assert (config.adapter, config.gradient_checkpointing, config.epochs) == (None, False, 1)


def test_inputs_that_wait_on_the_host(import_text: Import) -> None:
    for keys in (
        "gradient_checkpointing: offload\n",
        "gradient_checkpointing: true\nactivation_offloading: true\n",
    ):
        config = import_text(HEAD + ALPACA + keys).config
        assert isinstance(config, SFT)
        assert config.gradient_checkpointing == "offload"
    imported = import_text(HEAD + "gradient_checkpointing: offload\nrl: dpo\n" + PAIRS)
    assert isinstance(imported.config, DPO)
    assert imported.config.gradient_checkpointing is True
    assert "gradient_checkpointing" in imported.report.lost


def test_devices_that_compute_a_row_together_count_once(import_text: Import) -> None:
    batch = (
        "sequence_len: 1024\nmicro_batch_size: 2\ngradient_accumulation_steps: 3\ncontext_parallel_size: 4\n"
    )
    config = import_text(HEAD + batch + ALPACA, devices=8).config
    assert isinstance(config, SFT)
    assert (config.parallel.sequence, config.tokens_per_step) == (4, 2 * 3 * 2 * 1024)
    imported = import_text(HEAD + batch + "rl: dpo\n" + PAIRS, devices=8)
    assert imported.config.parallel.sequence == 1
    assert "TRL's trainers" in imported.report.lost["context_parallel_size"]


def test_chats_and_their_columns(import_text: Import) -> None:
    plain = import_text(HEAD + CHAT).config
    assert isinstance(plain, SFT)
    assert plain.data.kind == "chat"
    assert (plain.data.template, plain.data.sources[0].shape) == ("llama3", None)
    usual = (
        HEAD
        + CHAT
        + "    field_messages: conversations\n    message_property_mappings: {role: from, content: value}\n"
    )
    assert import_text(usual).config.data.sources[0].shape is None
    named = (
        HEAD
        + CHAT
        + "    field_messages: dialog\n    message_property_mappings: {role: who, content: says}\n"
    )
    named += "    roles: {user: [customer], assistant: [agent]}\n"
    imported = import_text(named)
    names: dict[str, Callable[[object], object]] = {}
    exec(imported.text, names)
    dialog = {"dialog": [{"who": "customer", "says": "hi"}, {"who": "agent", "says": "hello"}]}
    assert names["chat"](dialog) == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    }


def test_a_type_that_names_columns(import_text: Import) -> None:
    text = HEAD + (
        "datasets:\n  - path: rows.jsonl\n    type:\n      field_instruction: q\n      field_output: a\n"
        "      format: '[INST] {instruction} [/INST]'\n"
    )
    imported = import_text(text)
    names: dict[str, Callable[[object], object]] = {}
    exec(imported.text, names)
    assert names["rows"]({"q": "1", "a": "2"}) == {"instruction": "1", "output": "2"}
    assert "datasets.0.type.format" in imported.report.lost


@pytest.mark.parametrize("word", ["is", "lambda", "or"])
def test_a_file_that_is_named_as_a_word_of_python_has_a_function(import_text: Import, word: str) -> None:
    datasets = f"datasets:\n  - path: {word}.jsonl\n    type: chat_template\n    field_messages: turns\n"
    assert f"def rows_{word}(" in import_text(HEAD + datasets).text


def test_a_template_in_the_config_is_written_beside_it(import_text: Import) -> None:
    jinja = "{% for message in messages %}{{ message.content }}{% endfor %}"
    config = import_text(HEAD + CHAT.replace("llama3", "jinja") + f'chat_template_jinja: "{jinja}"\n').config
    assert config.data.template == "mine.jinja"
    assert Path("mine.jinja").read_text() == jinja
    own = import_text(HEAD + CHAT.replace("chat_template: llama3", "chat_template: gemma4"))
    assert own.config.data.template == "tokenizer"
    assert "gemma4" in own.report.decided["data.template"]


@pytest.mark.parametrize(
    "datasets",
    [
        "datasets:\n  - path: org/text\n    type: completion\n    field: body\n",
        "pretraining_dataset:\n  - path: org/text\n    name: en\n    type: pretrain\n    text_column: body\n",
    ],
)
def test_raw_text(import_text: Import, datasets: str) -> None:
    config = import_text(HEAD + "max_steps: 100\n" + datasets).config
    assert config.data.kind == "text"
    assert (config.data.sources[0].shape, config.max_steps) == ("mine.py:text", 100)


def test_preferences(import_text: Import) -> None:
    dpo = import_text(HEAD + PAIRS + "rl: ipo\nrl_beta: 0.2\nrpo_alpha: 0.5\n").config
    assert isinstance(dpo, DPO)
    assert (dpo.loss, dpo.beta, dpo.nll_weight, dpo.pairs_per_step, dpo.pairs_per_pass) == (
        "ipo",
        0.2,
        0.5,
        8,
        2,
    )
    assert dpo.data.template == "chatml"
    kto = import_text(HEAD + PAIRS.replace("intel", "ultra") + "rl: kto\nkto_desirable_weight: 0.2\n").config
    assert isinstance(kto, KTO)
    assert kto.desirable_weight == 0.2
    reward = import_text(
        HEAD + PAIRS.replace("chatml.intel", "bradley_terry.chat_template") + "reward_model: true\n"
    )
    assert isinstance(reward.config, RewardModel)
    assert reward.config.loss.gamma == 0
    orpo = import_text(HEAD + PAIRS + "rl: orpo\norpo_alpha: 0.1\n")
    assert isinstance(orpo.config, DPO)
    assert {"rl", "orpo_alpha"} <= orpo.report.lost.keys()


def test_adapters(import_text: Import) -> None:
    text = HEAD + ALPACA + "adapter: lora\nload_in_8bit: true\nlora_r: 8\nlora_dropout: 0.1\n"
    listed = import_text(
        text + "lora_target_modules: [q_proj, v_proj]\nlora_modules_to_save: [lm_head]\n"
    ).config
    assert listed.model.quantization == "int8"
    assert (listed.adapter.targets, listed.adapter.train_whole) == (("q_proj", "v_proj"), ("lm_head",))
    pattern = import_text(text + "lora_target_modules: 'model.layers.[0-9]+.mlp'\n")
    assert pattern.config.adapter.targets == "all-linear"
    assert "lora_target_modules" in pattern.report.lost
    experts = import_text(text + "lora_target_parameters: [mlp.experts.down_proj]\n")
    assert (experts.config.adapter.target_parameters, experts.config.adapter.dropout) == (
        ("mlp.experts.down_proj",),
        0,
    )
    none = import_text(HEAD + ALPACA + "load_in_4bit: true\nlora_r: 8\n")
    assert (none.config.model.quantization, none.config.adapter) == (None, None)
    assert "load_in_4bit" in none.report.lost
    assert none.report.idle["lora_r"] == "there is no adapter"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("deepspeed: zero3.json", "deepspeed"),
        ("fsdp_config: {offload_params: true}", "fsdp_config"),
        ("optimizer: muon", "optimizer"),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "plugins"),
        ("special_tokens: {eos_token: '<end>'}", "special_tokens.eos_token"),
        ("lr_scheduler: rex", "lr_scheduler"),
        ("unfrozen_parameters: [lm_head]", "unfrozen_parameters"),
        ("flying_carpet: 3", "flying_carpet"),
        ("early_stopping_patience: 3", "early_stopping_patience"),
    ],
)
def test_what_is_lost_is_told_by_name(import_text: Import, line: str, key: str) -> None:
    assert key in import_text(f"{HEAD}{ALPACA}{line}\n").report.lost


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "datasets: names no dataset"),
        (HEAD + "datasets:\n  - type: alpaca", r"theirs\.yaml.*: datasets\.0\.path: is missing"),
        (HEAD + "datasets: alpaca", "datasets: is 'alpaca', where a list of mappings"),
        (HEAD + ALPACA + "rl: grpo", r"theirs\.yaml:10: rl: grpo"),
        (HEAD + ALPACA + "rl: magic", "'magic' is none of"),
        (HEAD + ALPACA + "processor_type: AutoProcessor", "images"),
        (HEAD + ALPACA + "  - path: t\n    type: completion", "mixes raw text"),
        (HEAD.replace("1e-4", "quick") + ALPACA, "where a number was expected"),
        ("base_model:\n" + ALPACA, "base_model: is empty"),
        ("base_model: m\nload_in_4bit: 7\n" + ALPACA, "where true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_at_all_gets_one_sentence(
    import_text: Import, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_text(text)


def test_texts_of_any_kind_stay_texts_in_the_written_file(import_text: Import) -> None:
    column = 'it\'s "a\\b" \u202e 问'
    quoted = column.replace("\\", "\\\\").replace('"', '\\"')
    imported = import_text(
        f'{HEAD}datasets:\n  - path: rows.jsonl\n    type: completion\n    field: "{quoted}"\n'
    )
    names: dict[str, Callable[[object], object]] = {}
    exec(imported.text, names)
    assert names["rows"]({column: "text"}) == {"text": "text"}
    with pytest.raises(UserError, match=r"theirs\.yaml:7: holds half of a character"):
        import_text(HEAD + 'chat_template: "\\ud800"\n' + ALPACA)
