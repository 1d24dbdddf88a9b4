"""What other tools load: a whole pipeline, a file in the original layout, adapters, a card, an upload.

Imports evaluation and the rooms below. Serves export and push, which no other stage depends on: a change
reruns export alone.
"""
