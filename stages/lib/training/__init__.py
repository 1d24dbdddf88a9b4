"""How the UNet is trained: loop, batches, feed, optimizers, average, processes, checkpoints, export.

Imports diffusion and the rooms below. Serves train alone. What determines the weights is in the run's
identity, see `lineage`; what only watches, keeps or exports is not, and a run goes on after a change of it.
"""
