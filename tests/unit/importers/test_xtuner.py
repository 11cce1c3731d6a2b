"""XTuner 0.2 configs: what maps to what, and what is reported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.importers.conftest import CONFIGS, loads_as_reported
from tuner.config import DPO, SFT, Model, RewardModel
from tuner.data.conversation import Conversation, Turn
from tuner.data.template import Template
from tuner.errors import UserError
from tuner.importers.import_file import Imported, import_config
from tuner.models.tokenizer import load_tokenizer

Import = Callable[..., Imported]
SHIPPED = CONFIGS / "internlm2_7b_qlora_alpaca_e3.py"


@pytest.fixture
def edited(import_text: Import) -> Import:
    """Import the QLoRA config with texts replaced: edited({"old": "new"})."""

    def run(changes: dict[str, str], devices: int = 1) -> Imported:
        text = SHIPPED.read_text(encoding="utf-8")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        return import_text(text, "theirs.py", devices)

    return run


def test_the_values_of_a_qlora_config_are_carried(edited: Import) -> None:
    imported = edited({})
    config = imported.config
    assert isinstance(config, SFT)
    assert (config.model.path, config.model.quantization) == ("internlm/internlm2-7b", "nf4")
    assert config.adapter is not None
    assert (config.adapter.r, config.adapter.alpha, config.adapter.dropout) == (64, 16, 0.1)
    assert config.data.kind == "chat"
    assert (config.data.template, config.data.max_length, config.data.too_long) == ("internlm2", 2048, "cut")
    assert [source.path for source in config.data.sources] == ["tatsu-lab/alpaca"]
    assert (config.optimizer.lr, config.epochs, config.max_grad_norm) == (2e-4, 3, 1.0)
    assert (config.schedule.kind, config.schedule.warmup) == ("cosine", 0.03)
    # 1 pack of 2,048 tokens, 16 times; a checkpoint every 500 of such iterations is one every 31 steps
    assert (config.tokens_per_step, config.tokens_per_pass) == (32_768, 2_048)
    assert (config.checkpoint.every, config.checkpoint.keep) == (31, 2)
    assert imported.report.decided.keys() == {"checkpoint.every", "tokens_per_step"}
    assert imported.report.lost.keys() == {"custom_hooks.0.evaluation_inputs"}


def test_the_batch_is_that_of_all_devices(edited: Import) -> None:
    assert edited({}, devices=8).config.tokens_per_step == 8 * 32_768
    # four devices share a sequence, and accumulative_counts was raised by four for it
    config = edited({"sequence_parallel_size = 1": "sequence_parallel_size = 4"}, devices=8).config
    assert (config.tokens_per_step, config.parallel.sequence) == (8 * 32_768, 4)


def test_rows_that_are_not_packed_are_counted_at_their_longest(edited: Import) -> None:
    changes = {"pack_to_max_length = True": "pack_to_max_length = False", "batch_size = 1": "batch_size = 4"}
    imported = edited({**changes, "use_varlen_attn = True": "use_varlen_attn = False"})
    assert isinstance(imported.config, SFT)
    assert (imported.config.tokens_per_step, imported.config.tokens_per_pass) == (4 * 16 * 2048, 4 * 2048)
    assert "padded" in imported.report.decided["tokens_per_step"]


def test_schedules_and_lengths(edited: Import) -> None:
    config = edited({"eta_min=0.0": "eta_min=lr * 0.15", "start_factor=1e-5": "start_factor=1 / 40"}).config
    assert (config.schedule.final, config.schedule.warmup_start) == (0.15, 0.025)
    by_iterations = {
        "by_epoch=True, begin=0, end=warmup_ratio * max_epochs": "by_epoch=False, begin=0, end=320",
        "type=TrainLoop, max_epochs=max_epochs": "type=IterBasedTrainLoop, max_iters=16000",
    }
    config = edited(by_iterations).config
    assert config.max_steps == 1000
    assert config.schedule.warmup == 0.02
    constant = edited({"    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, "
                       "begin=warmup_ratio * max_epochs, end=max_epochs),\n": ""}).config  # fmt: skip
    assert (constant.schedule.kind, constant.schedule.warmup) == ("constant", 0.03)


def test_full_and_int8_and_lora(edited: Import) -> None:
    lora = 'lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"),'
    quantized = (
        'quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4"),'
    )
    full = edited({lora: "", quantized: ""}).config
    assert (full.adapter, full.model.quantization) == (None, None)
    eight = edited({"load_in_4bit=True": "load_in_4bit=False, load_in_8bit=True"}).config
    assert eight.model.quantization == "int8"
    named = edited(
        {'bias="none"': "target_modules=['wqkv', 'wo'], modules_to_save=['output'], use_rslora=True"}
    )
    assert named.config.adapter.targets == ("wqkv", "wo")
    assert named.config.adapter.train_whole == ("output",)
    # alpha / sqrt(r) = alpha' / r
    assert named.config.adapter.alpha == 16 * 8


def test_map_functions_become_row_functions(edited: Import) -> None:
    imported = edited({"alpaca_map_fn": "alpaca_zh_map_fn"})
    names: dict[str, object] = {}
    exec(imported.text, names)
    convert = names["alpaca_zh"]
    assert callable(convert)
    row = {"instruction_zh": "问", "input_zh": "", "output_zh": "答"}
    assert convert(row) == {"instruction": "问", "input": "", "output": "答"}


def test_oasst1_is_split_into_turns(edited: Import) -> None:
    imported = edited({"alpaca_map_fn": "oasst1_map_fn"})
    names: dict[str, object] = {}
    exec(imported.text, names)
    convert = names["oasst1"]
    assert callable(convert)
    row = {"text": "### Human: Hi: there### Assistant: Hello.### Human: And?"}
    assert convert(row) == {
        "messages": [
            {"role": "user", "content": "Hi: there"},
            {"role": "assistant", "content": "Hello."},
        ]
    }


@pytest.mark.parametrize(
    ("map_fn", "system"),
    [("law_reference_map_fn", "lawyer"), ("sql_map_fn", "sql"), ("tiny_codes_map_fn", "coder")],
)
def test_system_prompts_of_map_functions_are_reported(edited: Import, map_fn: str, system: str) -> None:
    lost = edited({"alpaca_map_fn": map_fn}).report.lost
    assert f"SYSTEM_TEMPLATE.{system}" in lost["train_dataloader.dataset.dataset_map_fn"]


def test_raw_text_becomes_continued_pre_training(edited: Import) -> None:
    config = edited(
        {
            "alpaca_map_fn": "pretrain_map_fn",
            'path="tatsu-lab/alpaca"': "path='json', data_files=dict(train=['a.json', 'b.json'])",
        }
    ).config
    assert config.data.kind == "text"
    assert [source.path for source in config.data.sources] == ["a.json", "b.json"]


def test_several_datasets(edited: Import) -> None:
    imported = edited(
        {"sampler = Seq": "oasst = dict(**alpaca_en)\noasst.dataset = dict(type=load_dataset, path='b', split='x')\n"
                          "sampler = Seq",
         "dataset=alpaca_en": "dataset=dict(type=ConcatDataset, datasets=[alpaca_en, oasst])"}
    )  # fmt: skip
    assert [(source.path, source.split) for source in imported.config.data.sources] == [
        ("tatsu-lab/alpaca", "train"),
        ("b", "x"),
    ]


def test_a_template_without_counterpart_is_written_beside_the_config(edited: Import) -> None:
    imported = edited({"PROMPT_TEMPLATE.internlm2_chat": "PROMPT_TEMPLATE.default"})
    assert imported.config.data.template == "mine.jinja"
    text, learned = rendered("mine.jinja", "system:Be kind.", "user:Hi", "assistant:Hello")
    assert text == "<s><|System|>:Be kind.\n<|User|>:Hi\n<|Bot|>:Hello</s>\n"
    assert learned == ["Hello</s>"]


def test_markers_in_the_config_are_a_template_too(edited: Import) -> None:
    markers = "dict(SYSTEM='S {system}\\n', INSTRUCTION='Q \"{input}\" A', SUFFIX='<end>', SUFFIX_AS_EOS=True, SEP='|')"
    edited({"PROMPT_TEMPLATE.internlm2_chat": markers})
    text, learned = rendered("mine.jinja", "user:Hi", "assistant:Hello")
    assert text == '<s>Q "Hi" AHello<end>|'
    assert learned == ["Hello<end>"]


def rendered(file: str, *texts: str) -> tuple[str, list[str]]:
    """The text of a conversation by a template, with the embedded tokenizer, and the parts of it in the loss.

    texts: of the roles "system", "user" and "assistant" in turn, each before a colon.
    """
    tokenizer = load_tokenizer(Model(path="tuner:tiny"))
    turns = tuple(Turn(*text.split(":", 1)) for text in texts)
    written = Template(file, tokenizer).render(Conversation(turns))
    return written.text, [written.text[start:stop] for start, stop, _ in written.spans]


def test_a_template_of_many_words_is_the_models_own(edited: Import) -> None:
    imported = edited({"PROMPT_TEMPLATE.internlm2_chat": "PROMPT_TEMPLATE.vicuna"})
    assert imported.config.data.template == "tokenizer"
    assert "vicuna" in imported.report.decided["data.template"]


REWARD = """
from xtuner.model.reward import RewardModel
model = dict(
    type=RewardModel, loss_type={loss!r}, penalty_type={penalty!r},
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path='internlm/internlm2-chat-1_8b-sft'),
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=build_preference_dataset,
        dataset=dict(type=load_dataset, path='argilla/ultrafeedback-binarized-preferences-cleaned'),
        max_length=2048, dataset_map_fn=orpo_dpo_mix_40k_map_fn, is_dpo=False, is_reward=True,
        reward_token_id={token}, use_varlen_attn=True, max_packed_length=4096))
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-5, betas=(0.9, 0.95)), accumulative_counts=8)
param_scheduler = []
"""


def test_reward_models(import_text: Import) -> None:
    imported = import_text(REWARD.format(loss="focal", penalty="log_barrier", token=92527), "theirs.py")
    config = imported.config
    assert isinstance(config, RewardModel)
    assert (config.loss.gamma, config.loss.penalty, config.loss.barrier) == (2.0, "log", 0.02)
    assert (config.reward_token, config.tokens_per_step) == ("[UNUSED_TOKEN_130]", 8 * 4096)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.max_grad_norm is None
    plain = import_text(REWARD.format(loss="ranking", penalty="none", token=7), "theirs.py")
    assert isinstance(plain.config, RewardModel)
    assert (plain.config.loss.gamma, plain.config.loss.barrier, plain.config.reward_token) == (0, 0, None)
    assert "train_dataloader.dataset.reward_token_id" in plain.report.lost


def test_polar(import_text: Import) -> None:
    text = REWARD.format(loss="ranking", penalty="none", token=92527)
    imported = import_text(text.replace("is_reward=True", "is_reward=True, is_reference=True"), "theirs.py")
    assert (imported.config.data.template, imported.config.data.too_long) == ("polar", "drop")
    assert "POLAR" in imported.report.decided["data.too_long"]
    assert not any("is_reference" in key for key in imported.report.lost)


def test_the_barrier_equals_the_sum_of_two_penalties() -> None:
    """XTuner: 0.01 times the penalties of both answers, per pair; here: barrier times their mean."""
    chosen, rejected = 1.7, 0.4
    assert 0.01 * (chosen + rejected) == pytest.approx(0.02 * (chosen + rejected) / 2)


DPO_CONFIG = (
    REWARD.replace("RewardModel", "{kind}")
    .replace(
        "loss_type={loss!r}, penalty_type={penalty!r},", "loss_type={loss!r}, beta=0.2, label_smoothing=0.1,"
    )
    .replace("is_dpo=False, is_reward=True", "is_dpo=True, is_reward=False")
    .replace("{token}", "-1")
)


def test_dpo(import_text: Import) -> None:
    config = import_text(DPO_CONFIG.format(kind="DPO", loss="robust"), "theirs.py").config
    assert isinstance(config, DPO)
    assert (config.loss, config.beta, config.label_smoothing) == ("robust", 0.2, 0.1)
    assert (config.pairs_per_step, config.pairs_per_pass) == (8, 1)
    assert config.data.incomparable == "drop"


def test_orpo_is_dpo_with_a_likelihood_and_a_word_on_it(import_text: Import) -> None:
    imported = import_text(DPO_CONFIG.format(kind="ORPO", loss="sigmoid"), "theirs.py")
    assert isinstance(imported.config, DPO)
    assert imported.config.nll_weight == 1.0
    assert {"model.type", "model.beta"} <= imported.report.lost.keys()


def test_a_config_of_a_run_folder_spells_types_as_texts(edited: Import) -> None:
    plain = edited({}).config
    spelled = edited(
        {
            "type=SupervisedFinetune": "type='xtuner.model.SupervisedFinetune'",
            "type=AutoModelForCausalLM.from_pretrained": "type='transformers.AutoModelForCausalLM.from_pretrained'",
            "PROMPT_TEMPLATE.internlm2_chat": "'xtuner.utils.PROMPT_TEMPLATE.internlm2_chat'",
            "dataset_map_fn=alpaca_map_fn": "dataset_map_fn='xtuner.dataset.map_fns.alpaca_map_fn'",
            "type=load_dataset": "type='datasets.load_dataset'",
            "torch.float16": "'torch.float16'",
        }
    ).config
    assert spelled == plain


def test_no_key_is_dropped_in_silence(edited: Import) -> None:
    imported = edited(
        {
            "log_level = ": "surprise = dict(a=1)\nload_from = 'x.pth'\nlog_level = ",
            "r=64,": "r=64, wonder=7,",
        }
    )
    assert "wonder" in " ".join(imported.report.lost)
    assert "tuner does not know this key" in imported.report.lost["model.lora.wonder"]
    assert "model.path" in imported.report.lost["load_from"]
    assert "surprise" in imported.report.idle


def test_a_value_that_is_computed_is_reported(edited: Import) -> None:
    imported = edited(
        {"lora_dropout=0.1": "lora_dropout=drop()", "lr = 2e-4": "lr = float(os.environ['LR'])"}
    )
    assert "would have to be run" in imported.report.lost["model.lora.lora_dropout"]
    assert "would have to be run" in imported.report.lost["optim_wrapper.optimizer.lr"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type=SupervisedFinetune", "type=LLaVAModel", r"theirs\.py:\d+: model\.type: LLaVAModel is none of"),
        ("type=process_hf_dataset", "type=MOSSSFTDataset", r"theirs\.py:\d+: .*MOSS"),
        ("pretrained_model_name_or_path = \"internlm/internlm2-7b\"", "pretrained_model_name_or_path = find()",
         r"theirs\.py:\d+: model\.llm\.pretrained_model_name_or_path: is missing or computed"),
        ("r=64", "r='many'", r"theirs\.py:\d+: model\.lora\.r: is 'many', where a number"),
        ("r=64", "r=0.5", "whole number"),
        ("r=64", "r=-3", r"LoRA\.r: "),
        ("lr = 2e-4", "lr = 0", r"AdamW\.lr: input should be greater than 0"),
        ("max_length = 2048", "max_length = None", "max_length: is missing"),
        ("type=AutoModelForCausalLM.from_pretrained,\n        pretrained", "pretrained", None),
        ("dataset=alpaca_en", "dataset=make()", "train_dataloader"),
        ("model = dict(", "models = dict(", "`model` is missing"),
        ("lora=dict(", "lora=list(", None),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_at_all_gets_one_sentence(
    edited: Import, old: str, new: str, message: str | None
) -> None:
    if message is None:
        edited({old: new})
        return
    with pytest.raises(UserError, match=message):
        edited({old: new})


def test_python_that_is_no_config_is_told(import_text: Import) -> None:
    with pytest.raises(UserError, match="no config of XTuner"):
        import_text("x = 1", "theirs.py")
    with pytest.raises(UserError, match="trainer of transformers"):
        import_text("training_args = dict(a=1)\nmodel = dict()", "theirs.py")


def test_the_whole_config_is_written_as_a_reader_would(edited: Import) -> None:
    imported = import_config(SHIPPED, Path("mine.py"))
    loads_as_reported(imported)
    assert (
        imported.text
        == '''"""SFT: internlm/internlm2-7b.

Imported from XTuner 0.2: internlm2_7b_qlora_alpaca_e3.py
"""

from tuner.config import SFT, AdamW, Chat, Checkpoint, Cosine, LoRA, Model, Source

config = SFT(
    model=Model(path="internlm/internlm2-7b", quantization="nf4"),
    adapter=LoRA(r=64, alpha=16, dropout=0.1),
    data=Chat(
        files=(Source(path="tatsu-lab/alpaca"),),
        template="internlm2",
        max_length=2_048,
        too_long="cut",
    ),
    optimizer=AdamW(lr=2e-4),
    schedule=Cosine(warmup=0.03),
    epochs=3,
    checkpoint=Checkpoint(
        # 500 iterations, of which 16 made a step
        every=31,
    ),
    tokens_per_pass=2_048,
    # batch_size 1 × accumulative_counts 16 × 1 device = 16 packs of 2,048 tokens
    tokens_per_step=32_768,
)
'''
    )
