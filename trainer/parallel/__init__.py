"""Everything that knows of processes."""
