"""The ladder by hand, and on shapes of real models: what is chosen fits, as a check of it says, and nothing faster."""

import json
from pathlib import Path

import pytest

from tests.equivalence.conftest import SMALL_REWARD
from tuner.config import StageConfig, load_config, override
from tuner.errors import UserError
from tuner.stages.check import CheckReport, check
from tuner.stages.memory_budget import Options, pass_sizes
from tuner.stages.memory_savings import RESERVE_GIB
from tuner.stages.registry import stage_of

LONG = {"optimizer.bits": 32, "data.max_length": 1_024}


@pytest.fixture(autouse=True)
def _nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_ladder_by_hand() -> None:
    """No recomputation first, but not in passes so small that recomputing in larger ones is faster."""
    rungs = [tuple(rung.values()) for rung in Options(passes=(4_096, 2_048, 1_024, 512)).ladder()]
    assert rungs == [
        *((4_096, False), (2_048, False), (1_024, False)),
        *((4_096, "selective"), (2_048, "selective"), (1_024, "selective")),
        *((4_096, True), (2_048, True), (1_024, True), (512, True)),
        *((4_096, "offload"), (2_048, "offload"), (1_024, "offload"), (512, "offload")),
    ]
    assert [tuple(rung.values()) for rung in Options(passes=(300, 200)).ladder()] == [
        *((300, False), (300, "selective"), (300, True), (200, True), (300, "offload"), (200, "offload")),
    ]
    of_trl = Options(recomputation=(False, True))
    assert list(of_trl.ladder()) == [{"gradient_checkpointing": False}, {"gradient_checkpointing": True}]


def test_pass_sizes_by_hand() -> None:
    assert pass_sizes(longest=2_048, share=32_768) == (8_192, 4_096, 2_048)
    assert pass_sizes(longest=1_500, share=32_768) == (8_192, 4_096, 2_048, 1_500)
    assert pass_sizes(longest=2_048, share=4_096) == (4_096, 2_048)  # of eight processes
    assert pass_sizes(longest=32_768, share=4_096) == (32_768,)  # a row is never split
    assert pass_sizes(longest=8_192, share=65_536, processes_per_row=4) == (32_768, 16_384, 8_192)


def written(config: StageConfig, report: CheckReport) -> StageConfig:
    """The config with what was chosen for it written out."""
    (choice,) = report.chosen.values()
    return override(config, {"memory": None, **choice.settings})


@pytest.mark.parametrize(
    ("name", "changes", "size", "expected"),
    [
        ("internlm2_7b_qlora", {}, "10GiB", {"tokens_per_pass": 4_096, "gradient_checkpointing": True}),
        ("internlm2_7b_qlora", {}, "80GiB", {"tokens_per_pass": 8_192, "gradient_checkpointing": False}),
        ("internlm2_7b_reward_qlora", LONG, "16GiB", {"gradient_checkpointing": "selective"}),
        ("internlm2_7b_dpo_qlora", {}, "24GiB", {"gradient_checkpointing": True}),
        ("internlm2_7b_ppo", {}, "24GiB", {"gradient_checkpointing": True}),
        ("internlm2_7b_ppo", {}, "20GiB", {"gradient_checkpointing": "offload"}),
    ],
)
def test_what_is_chosen_fits_and_nothing_faster(
    name: str, changes: dict[str, object], size: str, expected: dict[str, object]
) -> None:
    config = override(load_config(name), {**changes, "memory": size})
    report = check(config, shapes=True)
    (choice,) = report.chosen.values()
    room = float(size.removesuffix("GiB")) - RESERVE_GIB
    assert expected.items() <= choice.settings.items()
    assert choice.planned_gib == pytest.approx(report.peak_gib)
    assert report.peak_gib <= room
    again = check(written(config, report), shapes=True)
    assert again.peak_gib == pytest.approx(report.peak_gib)
    assert not again.chosen
    cache = {path: value for path, value in choice.settings.items() if path == "sampling.cache_gib"}
    if cache:  # also the next larger cache would not fit
        larger = override(written(config, report), {"sampling.cache_gib": 2 * cache["sampling.cache_gib"]})
        assert check(larger, shapes=True).peak_gib > room
    rungs = [dict(rung) | cache for rung in _options(config).ladder()]
    if (index := rungs.index(dict(choice.settings))) > 0:
        faster = override(written(config, report), rungs[index - 1])
        assert check(faster, shapes=True).peak_gib > room


def _options(config: StageConfig) -> Options:
    stage = stage_of(config)
    if config.stage == "reward":  # whose options are read off rows
        Path("pairs.jsonl").write_text(
            json.dumps({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}) + "\n"
        )
        rows = {"data.files": ["pairs.jsonl"], "conditions": {}}
        config = override(config, {**rows, "model.path": "tuner:tiny"})
    return stage.memory_options(config, 1)


def test_what_other_settings_exclude_is_not_chosen() -> None:
    config = override(load_config("internlm2_7b_reward_qlora"), {**LONG, "memory": "16GiB"})
    with_kernels = override(config, {"kernels": ["liger"]})  # which exclude "selective"
    ways = [check(each, shapes=True).chosen[""].settings for each in (config, with_kernels)]
    assert [settings["gradient_checkpointing"] for settings in ways] == ["selective", True]


def test_where_nothing_fits_it_is_said_what_saves_more() -> None:
    config = override(load_config("internlm2_7b_qlora"), {"memory": "6GiB", "optimizer.bits": 32})
    with pytest.raises(
        UserError, match=r"allow more; .*optimizer\.bits=8 \(\d\.\d\d GiB\).* would save more$"
    ):
        check(config, shapes=True)


def test_processes_make_smaller_passes() -> None:
    config = override(load_config("internlm2_7b_qlora"), {"memory": "80GiB", "tokens_per_step": 16_384})
    chosen = [check(config, shapes=True, processes=count).chosen[""].settings for count in (1, 8)]
    assert [settings["tokens_per_pass"] for settings in chosen] == [8_192, 2_048]


def test_the_answers_of_a_list_share_a_pass(tmp_path: Path) -> None:
    answers = [{"role": "assistant", "content": f"{number} " * 40} for number in range(6)]
    row = {"prompt": [{"role": "user", "content": "Count."}], "answers": [a["content"] for a in answers]}
    file = tmp_path / "lists.jsonl"
    file.write_text(json.dumps(row | {"ranks": list(range(6))}) + "\n")
    config = override(SMALL_REWARD, {"data.files": [str(file)], "conditions": {}, "tokens_per_step": 2_048})
    longest = stage_of(config).load_rows(config, _tokenizer(config)).train.lengths.max()
    assert longest > 2 * config.data.max_length / 2
    assert stage_of(config).memory_options(config, 1).passes[-1] >= longest


def _tokenizer(config: StageConfig) -> object:
    from tuner.models.load import load_tokenizer

    return load_tokenizer(stage_of(config).tokenizer_model(config))


def test_rounds_choose_for_each_part() -> None:
    sizes = {"policy.memory": "64GiB", "reward.memory": "40GiB"}
    config = override(load_config("internlm2_1_8b_cool"), sizes)
    report = check(config, shapes=True)
    assert {part: choice.memory for part, choice in report.chosen.items()} == {
        "policy": "64GiB",
        "reward": "40GiB",
    }
    assert report.peak_gib == pytest.approx(max(choice.planned_gib for choice in report.chosen.values()))


def test_without_a_gpu_a_check_says_how_auto_is_decided() -> None:
    config = override(load_config("internlm2_7b_qlora"), {"memory": "auto", "device": "cpu"})
    report = check(config, shapes=True)
    assert not report.chosen
    assert report.peak_gib == check(override(config, {"memory": None}), shapes=True).peak_gib
    sized = check(override(config, {"memory": "24GiB"}), shapes=True)
    on_card = check(config, shapes=True, card_gib=24.0)
    assert on_card.chosen[""].settings == sized.chosen[""].settings


def test_nothing_fits_with_what_would_save_more() -> None:
    config = override(load_config("internlm2_7b_lora"), {"memory": "12GiB"})
    with pytest.raises(UserError) as raised:
        check(config, shapes=True)
    text = str(raised.value)
    assert text.startswith("memory='12GiB': the smallest planned peak is ")
    assert "tokens_per_pass=2048, gradient_checkpointing=offload, and CUDA needs 1 GiB beside it" in text
    assert "model.quantization=nf4 (" in text
