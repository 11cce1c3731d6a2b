"""Quickstart: quickstart_cool, but people label the pairs: it stops after round one for `tuner label`."""

from tuner.config import People, load_config, override

config = override(load_config("quickstart_cool"), {"name": None, "feedback": [People()]})
