"""Which workers a request goes to: plain functions of plain data, with the time passed in.

    Fleet (what is known of the workers) + Ask (one request) -> Route (a decode worker, mostly a prefill worker, why)

`choice.Router` is the door, `by_time` the default policy and `cost` what it reckons with; `fleet`, `pool` and
`candidate` keep the workers as vectors; `speeds` predicts and `learning` corrects. No I/O, no gRPC calls: the
simulator asks the same functions millions of times.
"""

from frontend.router.ask import Ask
from frontend.router.choice import RETRY_AFTER_S, Router
from frontend.router.fleet import Fleet
from frontend.router.route import Fallback, Predicted, Reason, Route, alone

__all__ = ["RETRY_AFTER_S", "Ask", "Fallback", "Fleet", "Predicted", "Reason", "Route", "Router", "alone"]
