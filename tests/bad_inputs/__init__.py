"""Inputs of `prepare` that are bad, or only look so: made from nothing, each with how it has to end.

`every` has all cases, `cases` what one is, `running` how one is run and judged; the other modules make them, one
or two a kind. Nothing here reads the project's own readers: expectations are written by hand.
"""
