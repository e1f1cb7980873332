"""Models of images and their weights files; nothing of a run or a method."""
