"""The ground floor of Slipstream: wire stubs, client, configuration, errors, telemetry.

Every other package may import this one; this one imports none of them (the command line in
`slipstream.cli` composes the rest by late import).
"""

__version__ = "0.1.0"
