"""The tokenizer and the files of rows that tests of data use."""

from tests.unit.data.conftest import own_cache, tokenizer, write

__all__ = ["own_cache", "tokenizer", "write"]
