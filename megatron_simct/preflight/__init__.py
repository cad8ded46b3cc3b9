"""What can be known of a run before it is queued: whether the pair fits, the layout divides and the memory
suffices.

Reading order:
    memory.py     bytes of one rank, from the architecture, the layout and the batch sizes
    traffic.py    bytes of one step between the two jobs
    pair.py       tokenizers, stop tokens, chat templates, prompts, coverage: what the two models share
    cluster.py    nodes, times, containers, paths
    check.py      all of it for one run file, as findings
Nothing here runs a model or starts a process.
"""
