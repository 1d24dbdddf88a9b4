"""The sections of params.yaml, a frozen pydantic model each, in a module of its own.

Nothing here changes a byte: what a stage depends on is the value of a parameter, which DVC compares.
"""
