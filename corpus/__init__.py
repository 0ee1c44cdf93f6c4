"""The text: its sources and its tokens."""
