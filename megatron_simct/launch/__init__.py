"""From one YAML file (config/run_file.py) to two running jobs: on this machine, or as one Slurm job.

Reading order:
    commands.py        the two command lines, student and teacher; the one place that spells them
    local.py           both started here, their output side by side
    guard.py           what ends them where the launcher is killed
    slurm.py           one heterogeneous job: its script (slurm_job.sh.jinja), submission, status, logs,
                       cancelling
    address.py         by which address a node is reached
    __main__.py        python -m megatron_simct.launch
What cannot work is found by `megatron_simct.preflight` before anything starts.
"""
