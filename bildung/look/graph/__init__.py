"""The model as a graph of who reads whom, and circuits in it."""
