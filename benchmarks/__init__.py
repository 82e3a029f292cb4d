"""Measurements of the whole system from a client's side, each one command with JSON out.

first_light.py     `python -m benchmarks.first_light`: the cluster beside one aggregated engine
comparison.py      what is measured on each system, in which order, and what is made of it
phases.py          the two loads: one request after another; steady streams disturbed by long prompts
load.py            one streamed request over HTTP, with the arrival time of each token
prompts.py         prompts of exact lengths that share no prefix
server.py          a server that is measured: started, waited for, its CPU time, stopped
cluster_server.py  `slipstream up`
vllm_server.py     one aggregated vLLM engine
samples.py         percentiles and what the samples of a phase come to
report.py          targets, machine facts, JSON and table
"""
