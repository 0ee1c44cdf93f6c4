"""How any causal architecture of transformers trains here."""
