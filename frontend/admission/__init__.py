"""Who goes next, who waits and who is turned away, when more is asked of the cluster than it can do.

`claim` and `tenants` say what a request may ask for; `fair_queue`, `class_queues`, `in_flight` and `scheduler` decide
and are pure: the time is passed in, so that a simulator runs them as they are. `gate` is the asyncio around them.
"""
