"""Training: from one photograph to a model, step by step."""
