"""A base model on disk: where it comes from, its layout, what makes it usable, its weights and its loaders.

Imports core and frame. `families` says what a base of each kind has. `origins`, `files`, `pipeline_index`
and `checks` serve fetch_base alone and rerun no other stage; a change of `loaders` or `weights` counts for
every row and run that is computed with what they load.
"""
