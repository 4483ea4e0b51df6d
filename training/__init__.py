"""What the training scripts share: the loop, checkpoints, EMA, precision, randomness."""
