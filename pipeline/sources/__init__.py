"""Where pictures come from: one file a source, one small protocol."""
