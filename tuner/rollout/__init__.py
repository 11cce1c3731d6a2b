"""A policy's answers to a step's prompts, their scores, and the packed rows they are trained on."""
