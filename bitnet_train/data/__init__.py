"""From files to batches: rows, conversations, token ids, packing, order."""
