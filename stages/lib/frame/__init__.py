"""How a stage runs and talks: its turn, its parameters, its errors, its processes, its progress.

Nothing here changes a byte of any output, so nothing here is in a stage's dependencies or in a key, and
everything may be changed without rerunning anything. To keep that true, this room imports no other room, and
neither torch nor numpy nor PIL before a function needs them. Every room may import it.
"""
