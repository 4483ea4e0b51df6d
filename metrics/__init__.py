"""What the field reports of samples and reconstructions: distances of features, and of images. Functions of tensors."""
