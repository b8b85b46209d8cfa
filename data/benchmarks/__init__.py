"""Readers of public evaluation sets in their own formats, a module per family of sets, and the table of them."""
