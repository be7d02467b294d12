"""Losses and the networks that they look through."""
