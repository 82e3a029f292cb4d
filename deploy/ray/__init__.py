"""Workers as actors on the nodes of a Ray cluster, behind `slipstream up --on ray`. Requests never pass through Ray.

nodes.py         what Ray says of its nodes: alive, draining, with how much room
placement.py     which node the next worker gets; pure
worker_actor.py  the actor: one worker's process on its node, which ends by itself when nobody asks for it any more
places.py        placement groups and actors: made, found again by name, ended
pool.py          the workers that shall be there: started, drained, replaced when they or their nodes go
scaler_service.py  the pool as a planner's scaler, over gRPC
process.py       the process in which the pool lives, beside the control plane
launch.py        `slipstream up --on ray`: the components on this machine, and when all is ready
teardown.py      `slipstream down --on ray`: every worker of a named cluster ends

Only this package imports Ray; what is pure here does not.
"""
