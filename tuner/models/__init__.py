"""Models: loading, quantization, adapters, freezing, saving, merging, generation.

Importing this registers InternLM2 with transformers' Auto classes, the one import effect in tuner.
"""

from tuner.models.internlm2 import register
from tuner.models.internlm2_tokenizer import register_tokenizer

register()
register_tokenizer()
