"""The net. Nothing here knows of processes."""
