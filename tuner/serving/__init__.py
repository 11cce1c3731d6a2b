"""An OpenAI-compatible server on our own engine, and the commands that start others."""
