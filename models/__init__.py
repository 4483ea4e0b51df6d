"""The networks: SiT, the KL autoencoder, the PatchGAN discriminator and the frozen encoders, without training code."""
