"""Moves a prompt's KV blocks from the prefill worker that computed them to the decode worker that needs them.

    handoff.py         what the prefill side tells the decode side about one prompt
    board.py           the shared page on which the two sides agree who may read which blocks, and until when
    layout.py          where a worker's KV blocks lie in memory
    memory.py          one-sided copies between processes
    shm.py             the transport for workers on one host
    scheduler_side.py  the half that lives in vLLM's scheduler
    worker_side.py     the half that lives in vLLM's worker
    compression.py     quantizes blocks for slow links
    connector.py       the class vLLM loads, which joins the halves
    leases.py          the prefill service's view: opens, renews and releases leases

A handoff ends in one of four ways (`board.Outcome`); none of them leaves blocks pinned or a request waiting.
"""
