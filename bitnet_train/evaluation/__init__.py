"""How good a model is.

    perplexity    likelihood of text and of answers: nll, perplexity, bits per byte
    scoring       log-likelihood of given continuations, in batches
    tasks         multiple choice and generation from local files
    harness       the same models in lm-evaluation-harness (extra `eval`)
    cli           the command

All of them take any decoder: of masters, of packed codes, of a GGUF file.
"""
