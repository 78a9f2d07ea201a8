"""Draws samples from a finished or half-finished run.

  python -m launch.sample --workdir=runs/digits --num_samples=64 --seed=1 --output=samples.npz

The file holds one array for each thing that the recipe samples (images and energies, positions and
log rewards, ...), each with the samples along its first axis. numpy.load reads it.
"""

from __future__ import annotations

import jax
import numpy as np
from absl import flags

from launch import command, runs
from launch.runs import UserError

__all__ = ["main"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Run directory of a launch.train.", flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 64, "How many samples.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed; the same seed draws the same samples.", flag_values=FLAGS)
flags.DEFINE_string("output", "samples.npz", "File to write, ending in .npz.", flag_values=FLAGS)
flags.DEFINE_string(
    "checkpoint", "newest", "Which checkpoint: newest, best or a step.", flag_values=FLAGS
)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)


def _run(flag_values: flags.FlagValues) -> None:
    if flag_values.workdir is None:
        raise UserError("--workdir is missing; give the directory of a run.")
    if not 1 <= flag_values.num_samples < 2**31:
        raise UserError(
            f"num_samples is {flag_values.num_samples}; it must be at least 1 and below 2**31."
        )
    seed = command.seed(flag_values)
    output = command.output_file(flag_values, "output")
    if output.suffix != ".npz":
        raise UserError(f"output is {flag_values.output!r}; it must end in .npz.")
    loaded = runs.load_run(
        flag_values.workdir,
        checkpoint=flag_values.checkpoint,
        recipe_module=flag_values.recipe_module,
    )
    samples = loaded.run.sample(jax.random.key(seed), loaded.state, flag_values.num_samples)
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **samples)
    temporary.replace(output)
    held = ", ".join(f"{name} {list(np.shape(array))}" for name, array in samples.items())
    print(f"{output}: {held}, from step {int(loaded.state.step)} of {flag_values.workdir}")


COMMAND = command.Command("launch.sample", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
