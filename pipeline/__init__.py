"""Prepare data sets once (Ray), read them with DALI."""
