"""Feedback on answers: candidates that are compared, the people and programs that label them, and how far they agree."""
