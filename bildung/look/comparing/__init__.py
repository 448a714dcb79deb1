"""Two models beside each other: representations and weights."""
