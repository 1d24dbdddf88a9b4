"""Kinds of base models: what a base has, what its UNet is conditioned on, and how that is handed over.

Imports core and frame. Stages and the rooms above ask a `Family`, and never which one it is. A change here
counts for every stage that works with a base.
"""
