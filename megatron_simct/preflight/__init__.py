"""What can be known of a run before it is queued: whether the pair fits, the layout divides and
the memory suffices.

Reading order:
    check.py      all checks of one run file, as findings
    state.py      what the checks share: options, findings so far, models that were read
    options.py    options of each job, by themselves
    model.py      one model: architecture, layout, attention, tokenizer and chat template
    weights.py    the files of its weights
    prompts.py    the prompts of the run
    pair.py       tokenizers, stop tokens, chat templates, prompts, coverage: what the two models share
    lengths.py    lengths of prompts and responses; the bytes of one step between the two jobs (traffic.py)
    plans.py      the memory of each job, whether it fits, and what lowers it (memory.py)
    proposals.py  other options that would fit too, and be faster (stages.py)
    cluster.py    nodes, times, containers, paths
    engines.py    inference engines: interpreter, folder, port and memory
Nothing here runs a model or starts a process.
"""
