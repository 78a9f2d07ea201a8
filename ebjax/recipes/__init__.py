"""Recipes: published energy-based systems, one in a file."""
