"""Byte formats: ternary packing, Hugging Face folders, GGUF. Codes and scales in, bytes out; no model, no rounding."""
