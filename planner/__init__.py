"""The control plane: the registry of workers, and the planner of their counts.

The registry: `registry` is the pure soft state, `record_check` what a record must look like, `service` its gRPC face,
`server` the process. Nothing is stored: whoever restarts this process loses nothing, because the workers tell it
everything again.

The planner: `observation` is what it sees, `objectives` what it is to reach, `scaling` what a scaling policy is and
decides, `scaler` what starts and ends workers. Ours is `policy`: it learns the demand (`demand`, `forecast`), how
fast workers are (`corrections`) and how much room to leave (`caution`), predicts what counts of workers would give
(`capacity`, `pool_model`), chooses (`choose`), holds still where it should (`bars`, `schedule`), acts (`steps`) and
accounts for it (`account`). It never imports torch or vllm.
"""

import slipstream  # noqa: F401 - before anything imports gRPC
