"""From one YAML file to two running jobs: on this machine, or as one Slurm job.

Reading order:
    run_file.py        the file: what it may say, checked
    commands.py        the two command lines, student and teacher; the one place that spells them
    local.py           both started here, their output side by side
    slurm.py           one heterogeneous job: its script (slurm_job.sh.jinja), submission, status, logs, cancelling
    address.py         by which address a node is reached
    __main__.py        python -m megatron_simct.launch
What cannot work is found by `megatron_simct.preflight` before anything starts.
"""
