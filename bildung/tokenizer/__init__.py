"""Making and examining tokenizers; what a tokenizer is and does, and each algorithm step by step, lies in tokens/."""
