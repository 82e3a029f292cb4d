"""Who may talk to whom, and how that is protected: the one place that channels and servers come from.

    identity     what this process is: its role, its certificate, its tokens
    names        roles, and how certificates say them
    files        certificates and tokens, read again when they change
    channels     channels to other components, and of clients to the public face
    servers      gRPC servers and the ports they listen on
    guard        checks each call's token and role; `rules` says who may make it
    http_ends    TLS for the HTTP servers
    authority    makes certificates (`slipstream ca`)
    diagnosis    why a connection did not come about
    expiry       how long certificates are good for, as a metric

No other module calls gRPC's constructors of channels and ports.
"""
