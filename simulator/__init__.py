"""Discrete-event simulation: the real router and the simulated engine's scheduler under a virtual clock.

Nothing here sleeps, listens or reads a clock: a run is a function of a trace, a cluster and a seed.
"""
