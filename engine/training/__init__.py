"""Training: a photograph becomes a structure. Nothing at render time imports this package."""
