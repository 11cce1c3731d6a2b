"""Tokenizers keep their ids, from whichever file they are read."""

import json
import shutil

import pytest
import sentencepiece

from tests.small_models import UNUSED_TOKENS, train_sentencepiece
from tuner.config import Model
from tuner.errors import UserError
from tuner.models.load import load_tokenizer
from tuner.models.tokenizer import read_tokenizer, save_tokenizer

CHAT = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
TEXT = "<|im_start|>user\n请介绍 the function 42.<|im_end|>\n"


@pytest.fixture(
    scope="module",
    params=[("user_defined_symbols", False), ("user_defined_symbols", True), ("control_symbols", False)],
)
def bare_folder(request, tmp_path_factory, internlm2_folder):
    """InternLM2's base folder in small: a sentencepiece file whose last six entries are unused."""
    kind, dummy_prefix = request.param
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(internlm2_folder / "config.json", folder)
    train_sentencepiece(folder, add_dummy_prefix=dummy_prefix, **{kind: UNUSED_TOKENS})
    return folder


def test_a_bare_sentencepiece_file_gets_the_chat_tokens_at_their_ids(bare_folder):
    pieces = sentencepiece.SentencePieceProcessor(str(bare_folder / "tokenizer.model"))
    tokenizer = read_tokenizer(bare_folder)
    for number, name in zip(range(141, 147), CHAT, strict=True):
        wanted = pieces.piece_to_id(f"[UNUSED_TOKEN_{number}]")
        assert tokenizer.convert_tokens_to_ids(name) == wanted
        assert tokenizer.decode([wanted]) == name
        assert tokenizer(name, add_special_tokens=False)["input_ids"][-1] == wanted
        assert wanted in tokenizer.all_special_ids
    assert len(tokenizer) == pieces.get_piece_size()


@pytest.mark.parametrize("text", ["def f(x): return x", "  two  spaces", "请介绍五个景点", "a\nb\tc", "1234"])
def test_text_has_sentencepieces_own_ids(bare_folder, text):
    pieces = sentencepiece.SentencePieceProcessor(str(bare_folder / "tokenizer.model"))
    tokenizer = read_tokenizer(bare_folder)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]


def test_a_chat_models_settings_name_the_same_ids(bare_folder, tmp_path):
    """The released chat folders: the bare file, and a tokenizer_config.json that renames its entries."""
    folder = shutil.copytree(bare_folder, tmp_path / "chat")
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {
        str(pieces.piece_to_id(f"[UNUSED_TOKEN_{number}]")): {"content": name} | flags
        for number, name in zip(range(141, 147), CHAT, strict=True)
    }
    settings = {
        "added_tokens_decoder": added,
        "additional_special_tokens": CHAT,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    for leave_out in (None, "auto_map", "tokenizer_class"):
        remaining = {name: value for name, value in settings.items() if name != leave_out}
        (folder / "tokenizer_config.json").write_text(json.dumps(remaining))
        for trust in (False, True):
            tokenizer = read_tokenizer(folder, trust_remote_code=trust)
            assert tokenizer(TEXT)["input_ids"] == read_tokenizer(bare_folder)(TEXT)["input_ids"]
            assert tokenizer.get_vocab() == read_tokenizer(bare_folder).get_vocab()


def test_saving_and_loading_changes_no_id(bare_folder, tmp_path):
    tokenizer = read_tokenizer(bare_folder)
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (bare_folder / "tokenizer.model").read_bytes()
    again = read_tokenizer(tmp_path)
    assert again(TEXT) == tokenizer(TEXT)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_ids == tokenizer.all_special_ids


def test_saved_files_are_read_by_transformers_4_too(internlm2_folder, tmp_path):
    """Which knows neither the class TokenizersBackend nor a list of extra_special_tokens."""
    save_tokenizer(read_tokenizer(internlm2_folder), tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(values.get("extra_special_tokens"), list)


def test_code_named_by_the_tokenizer_is_not_asked_for(internlm2_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(internlm2_folder, tmp_path / "copy")
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values["tokenizer_class"] = "InternLM2Tokenizer"
    names = [
        "tokenization_internlm2.InternLM2Tokenizer",
        "tokenization_internlm2_fast.InternLM2TokenizerFast",
    ]
    file.write_text(json.dumps(values | {"auto_map": {"AutoTokenizer": names}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    assert load_tokenizer(Model(path=str(folder)))(TEXT) == read_tokenizer(internlm2_folder)(TEXT)


def test_a_broken_tokenizer(internlm2_folder, tmp_path):
    folder = shutil.copytree(internlm2_folder, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizer(Model(path=str(folder)))
