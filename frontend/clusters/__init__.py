"""The global frontend: one OpenAI-compatible address in front of several Slipstream clusters.

    request -> what it asks (`asked`) -> which cluster (`choice`, pure) -> its bytes forwarded -> another one on failure

`known` is what is known of each frontend of each cluster, `watch` asks them, `breaker` says whom to leave alone,
`upstream` is the HTTP client. Clusters say themselves how long a prompt would take there (`frontend.cluster_state`).
"""
