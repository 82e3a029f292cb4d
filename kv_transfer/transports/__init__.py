"""Ways of moving KV blocks between two workers, behind the interface in `base`."""
