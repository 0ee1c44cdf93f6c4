"""Load and train any causal architecture of transformers."""
