"""API keys: who may call a frontend, for what, and how much.

`secret` makes and checks the keys themselves; `key_file` is the file that holds their hashes, `edits` what
`slipstream keys` does to it, `keyring` what a frontend makes of it, `watch` rereads it. `bucket` is the arithmetic of
rates, `ledger` keeps the accounts, `table` where they are kept. `guard` is what the faces ask. Nothing here is used
where no `security.keys_file` is set.
"""
