"""Pictures of what a model makes of images; nothing of a run."""
