"""An engine that computes nothing and keeps time by a profile: for tests, planning and scale.

`scheduler` is pure: the discrete-event simulator runs it with its own clock, `engine` with the real one.
"""
