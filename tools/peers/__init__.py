"""The contestants of `benchmark_peers.py`, each a process of its own.

task        what all of them are given: a folder with the first weights, the rows and the held-out rows
prepare     the task out of the quickstart's recipe
process     a contestant's process: its turns and its result
clock       when a step ended, how many tokens it had, and what the held-out loss was
ours        bitnet_train by its command, with a callback that reads the clock
others      transformers in a plain loop, torchao, onebitllms, TRL's trainers
"""
