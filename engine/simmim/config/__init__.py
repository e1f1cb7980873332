"""The configuration of a run: sections, their bounds, and how they become an architecture."""
