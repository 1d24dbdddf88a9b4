"""A base model on disk: where it comes from, its layout, what makes it usable, its weights and its loaders.

Imports core and frame. `families` says what a base of each kind has. `origins`, `single_files`, `files`,
`pipeline_index` and `checks` serve fetch_base alone, `presets` it and export. `adapters`, `adapter_files` and
`trained` are what training adds to a base, and what is made of it. A change of `loaders` or `weights` counts
for every row and run that is computed with what they load.
"""
