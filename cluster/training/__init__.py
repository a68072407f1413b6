"""Training through Ray Train."""
