"""Slipstream on Kubernetes: how a planner starts, drains and flips worker pods, and which planner may.

The package `kubernetes` (extra `kubernetes`) is imported by `connection` and `api` alone, when they are used.
"""
