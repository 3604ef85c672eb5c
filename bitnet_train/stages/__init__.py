"""The three stages: what a batch's loss is. Each turns a model and a batch into sums; the training module divides."""
