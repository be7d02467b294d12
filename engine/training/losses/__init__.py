"""Losses, discriminators and VGG's feature maps, shared by both trainers."""
