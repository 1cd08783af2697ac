"""Module names of model families: many spellings, one canonical name; blocks and kinds of layers."""
