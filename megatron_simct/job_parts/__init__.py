"""Functions that build the parts of a training job from its options; `job.py` calls them in order.

prompts.py    prompts to sample, and given responses
student.py    the student's weights, the checkpoint that it resumes, and its copies
engines.py    where responses come from
labels.py     alignment, micro-batches, the shared vocabulary
grading.py    rewards, and the evaluation on held-out prompts
reports.py    timers, metrics of all ranks, responses that are written to files
"""
