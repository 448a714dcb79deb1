"""What was added up to a prediction, and which inputs mattered."""
