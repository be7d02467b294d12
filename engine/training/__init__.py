"""Training: a photograph becomes a model, part by part. Nothing at render time imports this package."""
