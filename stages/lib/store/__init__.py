"""Where results lie: the Zarr stores under data/, rows of them read one by one, and the work store.

Imports core and frame. The layout of a store is a contract with the stages that read it: whoever changes it
reruns the encoders and all that follows. The work store's format is its own: a block that cannot be read is
encoded again.
"""
