"""InternLM2's tokenizer from its sentencepiece file, as its original code builds it."""

from typing import Any

from tokenizers import AddedToken, decoders, normalizers
from transformers import AutoTokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from tuner.models.internlm2 import MODEL_TYPE, InternLM2Config

CHAT_TOKENS = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
"""Names that chat models give to the last six entries of the sentencepiece file, ids 92538 to 92543."""


class InternLM2Tokenizer(TokenizersBackend):
    """Reads tokenizer.json, or else tokenizer.model with the chat tokens.

    Beyond what transformers reads from a sentencepiece file, it adds the begin token before every text, the dummy
    prefix where the file has it, and the six chat tokens at the ids of unused entries.
    """

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Keyword arguments of the constructor, from those of `from_pretrained`."""
        file = kwargs.get("vocab_file")
        if kwargs.get("tokenizer_file") is not None or not str(file).endswith(".model"):
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(str(file))
        chat_tokens = _chat_tokens(pieces)
        kwargs["added_tokens_decoder"] = chat_tokens | (kwargs.get("added_tokens_decoder") or {})
        kwargs.setdefault("add_bos_token", True)
        kwargs.setdefault("pad_token", pieces.id_to_piece(pieces.eos_id()))
        native = super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        other_tokens = [
            token for token in native["additional_special_tokens"] if str(token) not in CHAT_TOKENS
        ]
        native["additional_special_tokens"] = [*other_tokens, *chat_tokens.values()]
        if pieces.encode("a", out_type=str)[0].startswith("▁"):
            _add_dummy_prefix(native["tokenizer_object"])
        return native


def register_tokenizer() -> None:
    """Make AutoTokenizer use this class for InternLM2; idempotent."""
    # transformers' LlamaTokenizer reads the same sentencepiece file, and gives other ids
    AutoTokenizer.register(InternLM2Config, tokenizer_class=InternLM2Tokenizer, exist_ok=True)
    # decides where a folder names another class; transformers' own entry is a generic class
    TOKENIZER_MAPPING_NAMES[MODEL_TYPE] = InternLM2Tokenizer.__name__


def _chat_tokens(pieces: Any) -> dict[int, AddedToken]:
    """Id → chat token, for the unused entries that the file has."""
    ids = {pieces.piece_to_id(unused): name for unused, name in CHAT_TOKENS.items()}
    return {
        token_id: AddedToken(name, normalized=False, special=True)
        for token_id, name in ids.items()
        if pieces.id_to_piece(token_id) in CHAT_TOKENS
    }


def _add_dummy_prefix(tokenizer: Any) -> None:
    """Add sentencepiece's dummy prefix, a space before every text, which decoding removes."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(content=" ", left=1)])
