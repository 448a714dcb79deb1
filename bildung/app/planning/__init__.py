"""What an operation will hold and compute, before it runs."""
