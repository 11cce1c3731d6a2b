"""The conditional reward model."""
