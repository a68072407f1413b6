"""Looking into a data set that exists."""
