"""Chaos: a cluster under load, with faults drawn from a seed, and a checker of what must hold that never sleeps.

    python -m tests.faults.chaos --seed 7 --minutes 10 --engine simulated
    python -m tests.faults.chaos --seed 7 --minutes 10 --only-plan

What a run does is a function of its seed, its length and the cluster's shape alone (`plan`): which requests are sent
when, which faults happen when. The moments at which processes get to them are the machine's. A run is made of rounds:
load and faults, then a quiet point, at which nothing may be held, left or grown (`quiet`). Every answer is compared
with what an undisturbed engine says (`answers`), every error with what is promised under the faults of that moment
(`promises`).

As a library: `tests.faults.chaos.run.run_in_process(Options(seed=7, minutes=2.0, engine="simulated"))` runs the command
in a process of its own and returns what `--json` writes: `requests`, `tries`, `faults`, `checked` are counts by name,
`violations` is empty when everything held. A run takes about half a minute more than its minutes.
"""
