"""The decode role: receives a prompt's KV blocks and generates from them."""
