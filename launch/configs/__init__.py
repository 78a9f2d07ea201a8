"""Built-in configs, one for each recipe; ``--config=NAME`` finds them from any folder."""
