"""Faster twins of functions in quant.py, each with a parity test. The package works without any of them."""
