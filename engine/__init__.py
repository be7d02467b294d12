"""engine: streaming inference for OUR-GAN."""
