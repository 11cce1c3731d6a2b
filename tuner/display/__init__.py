"""Everything that is drawn: terminal, curves, HTML pages, Jupyter. No domain logic."""
