"""Checkpoints in one file, in the layout of the original repositories: what one is, and its conversion.

Imports core, frame and the rest of models. Serves fetch_base alone.
"""
