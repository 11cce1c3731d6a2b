"""Supervised fine-tuning, and continued pre-training: the same loop over other rows."""
