"""A policy's answers to a step's prompts, and what is found out about every token of them."""
