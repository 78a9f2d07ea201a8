"""Writes the sampler of a run to a file that runs without this package, parameters included.

  python -m launch.export --workdir=runs/digits --output=digits.stablehlo

The file is StableHLO as jax.export writes it. It takes keys and returns one sample for each, where
jax and flatbuffers are installed and nothing else:

  exported = jax.export.deserialize(bytearray(open("digits.stablehlo", "rb").read()))
  samples = exported.call(jax.random.split(jax.random.key(0), 64))
"""

from __future__ import annotations

from typing import Any

import jax
from absl import flags

from ebjax.exporting import PLATFORMS, export_function
from ebjax.loading import learned_params
from launch import command, runs
from launch.runs import UserError

__all__ = ["main"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Run directory of a launch.train.", flag_values=FLAGS)
flags.DEFINE_string("output", "sampler.stablehlo", "File to write.", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_samples",
    0,
    "How many samples a call draws; 0: as many as it is given keys.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "platforms",
    "cpu,cuda,tpu",
    f"Where it will run: of {', '.join(PLATFORMS)}.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "checkpoint", "newest", "Which checkpoint: newest, best or a step.", flag_values=FLAGS
)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)


def _run(flag_values: flags.FlagValues) -> None:
    if flag_values.workdir is None:
        raise UserError("--workdir is missing; give the directory of a run.")
    num: Any = flag_values["num_samples"].value
    if not 0 <= num < 2**31:
        raise UserError(f"num_samples is {num}; it must be at least 0 and below 2**31.")
    output = command.output_file(flag_values, "output")
    run, _, state, name = runs.load_run(
        flag_values.workdir,
        checkpoint=flag_values.checkpoint,
        recipe_module=flag_values.recipe_module,
    )
    if run.draw is None:
        raise UserError(
            f"workdir is {flag_values.workdir}; its recipe {name!r} has no draw of one example."
        )
    draw, params = run.draw, learned_params(run, state)
    try:
        export_function(
            lambda key: draw(key, params),
            jax.random.key(0),
            output,
            num_examples=num or None,
            platforms=flag_values.platforms.split(","),
        )
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from None
    shape = list(jax.eval_shape(draw, jax.random.key(0), params).shape)
    print(
        f"{output}: keys [{num or 'N'}] to samples [{', '.join(map(str, [num or 'N', *shape]))}], "
        f"{output.stat().st_size:,} bytes, from step {int(state.step)} of {flag_values.workdir}"
    )


COMMAND = command.Command("launch.export", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
