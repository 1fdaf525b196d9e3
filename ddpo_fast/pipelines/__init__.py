"""Folders and files of models, read safely: which pipeline, which parts, from where."""
