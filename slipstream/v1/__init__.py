"""Generated from `proto/slipstream/v1/*.proto` by `make proto`; do not edit by hand."""
