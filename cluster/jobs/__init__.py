"""Submitting, watching and ending Ray jobs."""
