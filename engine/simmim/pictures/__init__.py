"""Pictures of what a model makes of images, and how near images are; nothing of a run."""
