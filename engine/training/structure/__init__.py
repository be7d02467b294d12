"""Training of step 1: an HP-VAE-GAN with vertical coordinates, scale by scale."""
