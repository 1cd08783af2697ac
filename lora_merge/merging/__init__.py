"""Merging: options, alignment of the inputs, module by module, the account and its report."""
