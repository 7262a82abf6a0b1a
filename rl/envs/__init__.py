"""Environments: batched functions over explicit state."""
