"""Step 1: the HP-VAE-GAN with vertical coordinates, trained scale by scale."""
