"""Features of labelled images: over ranks, kept as they come, gone on with after an interruption."""
