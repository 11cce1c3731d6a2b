"""The report card of a reward model: from scores to measures, words, tables and a page."""
