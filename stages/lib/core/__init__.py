"""What can change bytes and everyone needs: paths, files, tensors on disk, draws, devices, hashes.

Imports frame alone. A change reruns the stages that list this folder; encoded rows and training go on where
they were unless what computes them has changed, see `fingerprints.code_identity`.
"""
