"""The command line, `slipstream`: starts roles and whole clusters, asks them things, and shows the configuration.

It composes all other packages, by imports inside the commands: `slipstream --help` must not wait for gRPC or vLLM.

    app.py           the commands and how errors end them
    flags.py         flags made from the settings model
    roles.py         frontend, prefill-worker, decode-worker, planner serve
    local.py         up, demo: a cluster on this machine
    demo_account.py  the figures of one answer, measured and shown
    chat.py          a conversation in the terminal
    planner_*.py     planner policy, apply, explain, history
    status.py        what the registry knows
    show.py          config show, version
"""


def main() -> None:
    """The entry point of the `slipstream` command. Exits with 2 for wrong usage or configuration, 1 for failures."""
    from slipstream.cli.app import app

    app(prog_name="slipstream")
