"""Pictures of what a model makes of images, and how near images are; they know nothing of a run."""
