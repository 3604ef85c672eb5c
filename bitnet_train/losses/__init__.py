"""Losses as sums: tensors in, sums out. Whoever calls them divides once, by the count of the whole global batch."""
