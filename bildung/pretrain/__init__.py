"""Birth: a model from nothing but a tokenizer, a config and text; or more text for a model that is there."""
