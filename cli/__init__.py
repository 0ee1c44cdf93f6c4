"""Flags in, one-line errors out."""
