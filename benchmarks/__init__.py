"""Measurements of the whole system from a client's side, each one command with JSON out.

first_light.py     `python -m benchmarks.first_light`: the cluster beside one aggregated engine
pd_vs_nixl.py      `python -m benchmarks.pd_vs_nixl`: the cluster beside vLLM's own disaggregation
kv_compression.py  `python -m benchmarks.kv_compression`: what quantizing KV blocks costs, saves and changes
frontend.py        `python -m benchmarks.frontend`: our frontend beside NVIDIA Dynamo's, with workers that take no time
frontend_comparison.py  what it asks of both and makes of it; frontend_servers.py starts them
many_streams.py    its other half: thousands of streams through one frontend for minutes
overload.py        `python -m benchmarks.overload`: goodput, SLOs and Retry-After from half to three times the capacity
overload_simulated.py  its loads in virtual time; overload_real.py with processes; overload_report.py what both show
soak.py            `python -m benchmarks.soak`: an hour at 80% of capacity; soak_watch.py what the processes have
slope.py           whether a figure grows
offered_load.py    what overload and soak ask for; goodput.py what became of it
open_load.py       their load generator, a process of its own; http_exchange.py its connections
trust.py           `python -m benchmarks.trust`: load, faults, chaos, bad inputs and fuzzers in one report
instant_worker.py  those workers, for our frontend
stream_load.py     a closed load of streamed answers over many connections, cheaper than what it measures
transfer.py        `python -m benchmarks.transfer`: the transports beside raw copies and beside NIXL alone
transfer_peer.py   the sending worker of it; nixl_alone.py NIXL by itself
command.py         what commands do around their measurement: a deadline, an orderly end
comparison.py      first light: what is measured on each system, in which order, and what is made of it
pd_comparison.py   the same for pd_vs_nixl
phases.py          closed loads: one request after another; steady streams disturbed by long prompts
arrivals.py        the open load: requests at times drawn beforehand
load.py            one streamed request over HTTP, with the arrival time of each token
quantized_engine.py  one engine in this process, whose cached blocks are quantized in place
answer_difference.py  how far answers from quantized blocks are from the others
text_prompts.py    prompts of exact lengths made of English
prompts.py         prompts of exact lengths that share no prefix
server.py          a server that is measured: started, waited for, its CPU time, stopped
cluster_server.py  `slipstream up`
vllm_server.py     a vLLM engine behind vLLM's own server, aggregated or one of a pair
nixl_pair.py       the pair: vLLM with NixlConnector, prefill and decode, behind a proxy
nixl_proxy.py      that proxy
affinity.py        which CPUs the threads of a server may use
samples.py         percentiles and what the samples of a phase come to
report.py          targets, machine facts, JSON and table
"""

import slipstream  # noqa: F401 - before anything imports gRPC
