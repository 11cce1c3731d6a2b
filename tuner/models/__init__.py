"""Models: loading, quantisation, adapters, freezing, saving, merging, generation.

Importing this registers InternLM2 with transformers' Auto classes and `varlen` with its attentions: registry
calls, and the one import effect in tuner.
"""

from tuner.models import internlm2, varlen

internlm2.register()
varlen.register()
