"""Prints the figures of merit of a finished or half-finished run.

  python -m launch.evaluate --workdir=runs/hypergrid --json=figures.json

Which figures depends on the recipe: a flow with an exact target gives its total_variation and
jensen_shannon to it, and the learned log_z beside log_z_exact.
"""

from __future__ import annotations

import jax
from absl import flags
from rich.console import Console

from launch import command, runs
from launch.progress import print_figures
from launch.runs import UserError

__all__ = ["main"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Run directory of a launch.train.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of what is sampled.", flag_values=FLAGS)
flags.DEFINE_string("json", None, "File to write the figures to as well.", flag_values=FLAGS)
flags.DEFINE_string(
    "checkpoint", "newest", "Which checkpoint: newest, best or a step.", flag_values=FLAGS
)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)


def _run(flag_values: flags.FlagValues) -> None:
    if flag_values.workdir is None:
        raise UserError("--workdir is missing; give the directory of a run.")
    seed = command.seed(flag_values)
    json_path = None if flag_values.json is None else command.output_file(flag_values, "json")
    loaded = runs.load_run(
        flag_values.workdir,
        checkpoint=flag_values.checkpoint,
        recipe_module=flag_values.recipe_module,
    )
    figures = loaded.run.evaluate(jax.random.key(seed), loaded.state)
    figures = {"step": int(loaded.state.step), **figures}
    print_figures(Console(), figures)
    if json_path is not None:
        runs.write_json(json_path, figures)


COMMAND = command.Command("launch.evaluate", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
