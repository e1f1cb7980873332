"""Encoders: image and mask in, feature map out. They know nothing of methods, data or steps."""
