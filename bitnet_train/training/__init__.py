"""Lightning's side: the module that normalises and steps, checkpoints, callbacks, and the run that puts them together."""
