"""The report card of a reward model: from scored pairs to measures, a verdict in sentences, and tables."""
