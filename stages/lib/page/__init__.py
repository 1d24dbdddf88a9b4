"""The pages: what a run left behind, its lineage, charts, the comparison of several runs, the templates.

Imports evaluation and the rooms below. Serves gallery and `python -m stages.compare`; a change reruns
gallery alone.
"""
