"""The diffusion process, its samplers, and samples of trained networks."""
