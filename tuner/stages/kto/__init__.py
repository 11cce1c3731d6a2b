"""Kahneman-Tversky optimization, by TRL: a policy trained on answers that are each desirable or not."""
