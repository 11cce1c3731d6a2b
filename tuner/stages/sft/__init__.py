"""Supervised fine-tuning, and continued pre-training."""
