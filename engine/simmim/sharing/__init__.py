"""Folders to share: the Hub, model cards, and what they tell of a run."""
