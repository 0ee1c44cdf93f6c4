"""Run one training loop on several processes."""
