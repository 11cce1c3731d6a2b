"""Feedback on answers: candidates that are compared, who labels them, people and programs, and how far they agree."""
