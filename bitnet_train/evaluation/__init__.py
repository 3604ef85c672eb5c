"""How good a model is: negative log-likelihood, perplexity and bits per byte of text and of answers."""
