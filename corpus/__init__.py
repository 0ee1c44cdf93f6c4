"""Text: where it comes from, and as which tokens."""
