"""COOL RLHF: rounds of reward model, policy and feedback."""
