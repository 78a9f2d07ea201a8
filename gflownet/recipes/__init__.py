"""Recipes: published GFlowNet systems, one in a file."""
