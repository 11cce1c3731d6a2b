"""The stages: a folder each, behind one protocol (`stage.py`) and one registry (`registry.py`)."""
