"""Models of images and their weights files; they know nothing of a run or a method."""
