"""Fuzzers (atheris, libFuzzer) of everything that reads bytes which somebody else made; `python -m tests.fuzz`.

`targets` has one function for each reader, with messages to begin from; `one` runs one of them under libFuzzer in a
process of its own; `campaign` runs them one after another and counts, for `benchmarks.trust` too:

    run(names, runs=..., seconds=..., seed=...) -> list of Outcome (name, inputs, coverage, crashes)
"""
