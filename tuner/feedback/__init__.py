"""Feedback on answers: candidates that are compared, the people who label them, and how far they agree."""
