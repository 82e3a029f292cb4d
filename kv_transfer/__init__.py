"""Moves a prompt's KV blocks to the worker that needs them, while another one computes them.

    connector.py       the class vLLM loads, which joins the two halves of it
    scheduler_side.py  the half in vLLM's scheduler: what is received and sent
    worker_side.py     the half in vLLM's worker: tells the agent what each step does, watches leases
    accounts.py        what each request cost

    agent.py           the thread that owns all transfers of an engine; agent_start.py makes it from the settings
    exchange.py        its handoffs and connections
    inbound.py         the receiver's part of one handoff; outbound.py the sender's
    sender_link.py     the receiver's end of a control connection; receiver_link.py the sender's
    channel.py         framed messages with signs of life; wire.py the messages
    ways.py            which way two workers use; path_probe.py measures one
    transports/        ways of moving bytes, behind one small interface

    handoff.py         what names a handoff, and the digests that bind bytes to it
    extents.py         which pieces of a prompt are meant
    kv_memory.py       an engine's blocks as bytes; layout.py where they lie
    compression.py     quantizes blocks for slow links
    model_identity.py  which model's blocks they are

    board.py           the shared page of an engine and its service: leases, counters
    leases.py          the service's view of it

A handoff ends in one of a few ways (`board.Outcome`); none of them leaves blocks pinned or a request waiting.
"""

import slipstream  # noqa: F401 - before anything imports gRPC
