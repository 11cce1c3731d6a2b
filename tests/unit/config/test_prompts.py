"""Config of prompts: its checks, and fields that other kinds of data reject."""

import pytest
from pydantic import ValidationError

from tuner.config.data import Chat, Preferences, Prompts, Source, Split, Text


def test_defaults():
    prompts = Prompts(files=("a.jsonl",))
    assert (prompts.kind, prompts.template, prompts.system, prompts.max_length) == (
        "prompts",
        "tokenizer",
        None,
        1024,
    )


def test_json_round_trip():
    source = Source(path="b.jsonl", share=2.0, condition="polite", system="You are kind.", shape="prompt")
    prompts = Prompts(
        files=(source, Source(path="a.jsonl", share=1.0)),
        test_files=("t.jsonl",),
        template="internlm2",
        system="You help.",
        max_length=64,
        split=Split(test=0.1),
    )
    assert Prompts.model_validate_json(prompts.model_dump_json()) == prompts
    assert prompts.sources[0].system == "You are kind."


@pytest.mark.parametrize("kind", [Chat, Text, Preferences])
@pytest.mark.parametrize("field", ["files", "validation_files", "test_files"])
def test_only_prompts_support_a_sources_system_turn(kind, field):
    fields = {"files": ("a.jsonl",)} | {field: (Source(path="b.jsonl", system="Be kind."),)}
    with pytest.raises(
        ValidationError, match=r"b\.jsonl has a system, which only prompts have; leave it out"
    ):
        kind(**fields)


@pytest.mark.parametrize("fields", [{"validation_files": ("b.jsonl",)}, {"split": Split(validation=0.1)}])
def test_prompts_have_no_validation_part(fields):
    with pytest.raises(ValidationError, match=r"answers the test prompts; write test_files or split\.test"):
        Prompts(files=("a.jsonl",), **fields)


@pytest.mark.parametrize("field", ["files", "test_files"])
def test_prompts_have_no_weights(field):
    fields = {"files": ("a.jsonl",)} | {field: (Source(path="b.jsonl", weight=2.0),)}
    with pytest.raises(ValidationError, match=r"b\.jsonl has a weight, which prompts do not; write share"):
        Prompts(**fields)


def test_too_long_prompts_are_always_skipped():
    with pytest.raises(ValidationError, match="Prompts has no field 'too_long'"):
        Prompts(files=("a.jsonl",), too_long="drop")  # type: ignore[call-arg]
