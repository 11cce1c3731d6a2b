"""Configs of other trainers as configs of tuner: what carries over, what had to be decided, and what could not."""
