"""The loop, its step, its optimizer and its run folder."""
