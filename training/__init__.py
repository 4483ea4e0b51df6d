"""What the training scripts share: command lines, the loop, checkpoints, EMA, precision, randomness."""
