"""Workers as actors on the nodes of a Ray cluster, behind `slipstream up --on ray`. Requests never pass through Ray.

nodes.py         what Ray says of its nodes: alive, draining, with how much room
placement.py     which node the next worker gets; pure
worker_actor.py  the actor: one worker's process on its node, which ends by itself when nobody asks for it any more
places.py        placement groups and actors: made, found again by name, ended
orders.py        from settings to what a worker shall be
adoption.py      what an earlier pool has left: taken over, or drained
draining.py      until when a worker on a node that will go may wait for its replacement; pure
placing.py       a place for each worker, one after the other
pool_worker.py   one worker as the pool knows it
pool.py          the workers that shall be there: started, drained, replaced when they or their nodes go
scaler.py        the pool as a planner's scaler
scaler_service.py  that over gRPC
joining.py       becoming a driver of a Ray cluster
process.py       the process in which the pool lives, beside the control plane
launch.py        `slipstream up --on ray`: the components on this machine, and when all is ready
teardown.py      `slipstream down --on ray`: every worker of a named cluster ends
kuberay.yaml     the same on Kubernetes: a RayCluster of KubeRay

Only this package imports Ray; what is pure here does not.
"""
