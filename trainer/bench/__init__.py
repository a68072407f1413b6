"""From disk to gradient: every stage measured, the limit named."""
