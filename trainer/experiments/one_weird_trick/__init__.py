"""Krizhevsky's "one weird trick" (2014) beside the two towers: equality with one process, bytes, speed."""
