"""Methods of pre-training: each supplies the views of a sample, its module and its loss."""
