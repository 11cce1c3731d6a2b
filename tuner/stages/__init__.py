"""The stages, a folder each, behind one interface (`stage.py`) and one registry (`registry.py`)."""
