"""Making instructions and answers with a model."""
