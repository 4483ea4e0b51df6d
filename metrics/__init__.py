"""Metrics of samples and reconstructions, as functions of tensors, and the statistics of sets of images."""
