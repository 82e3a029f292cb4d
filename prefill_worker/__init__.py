"""The prefill role: computes a prompt and holds its KV blocks for one decode worker."""
