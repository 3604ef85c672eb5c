"""Lightning's side: the module that normalises and steps, checkpoints, callbacks, and the run made of them."""
