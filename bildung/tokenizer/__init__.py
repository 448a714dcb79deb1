"""Learning, tracing and comparing tokenizers; the tokenizer itself, and each algorithm, lies in tokens/."""
