"""Foreign inputs told by the energy of a classifier: digits 0 to 7 against everything else.

scikit-learn's bundled images of 8x8 pixels, scaled to [0, 1]. The classes 0 to 7 are the task; 8
and 9, permuted, mixed and turned images and noise are foreign. First a classifier is trained as
usual; then two squared hinges push the energy of its images below one margin and that of auxiliary
outliers (training images under other permutations, shifted and flipped) above another. The run's
checkpoint at ``num_pretraining_steps`` is the plain classifier:

    python -m launch.evaluate --workdir=RUN --checkpoint=940

Scores are the energy -log Σ exp f and the maximal softmax probability (MSP), read as
-log p_max, which ranks alike.

Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection", NeurIPS 2020.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.energies.joint import free_energy
from ebjax.energies.networks import mlp_classifier
from ebjax.numerics import shuffled_index
from ebjax.objectives.energy_bounded import OutlierBatch, energy_bounded
from ebjax.parallel import AXIS_NAME
from ebjax.training import (
    TrainingConfig,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Recipe, Run, Source, TrainState

__all__ = ["EnergyOodConfig", "recipe"]

_NUM_CLASSES = 8
_NUM_PIXELS = 64
_NUM_OTHER_ORDERS = 5
_NUM_CORRUPTIONS = _NUM_OTHER_ORDERS + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyOodConfig(TrainingConfig):
    """Settings of the classifier and of its fine-tuning."""

    num_steps: int = setting(1100, "updates in all; may be raised later to go on with a run")
    batch_size: int = setting(64, "images of one update, over all devices")
    log_every: int = setting(20, "steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(940, "steps between checkpoints")
    ema_decay: float = setting(0.0, "decay of the averaged parameters; 0 takes those of the step")
    num_training: int = setting(1000, "images of the eight classes that training sees")
    num_pretraining_steps: int = setting(940, "steps of plain classification, 60 passes")
    num_fine_tuning_steps: int = setting(160, "steps over which the rate then decays, 10 passes")
    outliers_per_example: int = setting(2, "auxiliary outliers beside each image")
    hidden_features: tuple[int, ...] = setting((256, 256), "widths of the hidden layers")
    learning_rate: float = setting(1e-3, "learning rate of AdamW")
    weight_decay: float = setting(1e-4, "its weight decay")
    hinge_weight: float = setting(0.1, "weight of the two squared hinges")
    margin_in_offset: float = setting(
        -2.0, "m_in is the mean energy after pretraining plus this; energies stay below it"
    )
    margin_out: float = setting(-2.0, "m_out; energies of outliers stay above it")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_between(self, 200, 1400, "num_training")
        check_at_least(self, 1, "num_pretraining_steps", "num_fine_tuning_steps")
        check_at_least(self, 1, "outliers_per_example")
        check_at_least(self, 0, "learning_rate", "weight_decay", "hinge_weight")
        check_between(self, -1e6, 1e6, "margin_in_offset", "margin_out")
        check_widths(self, "hidden_features")


@dataclasses.dataclass(frozen=True)
class Sets:
    """All images, flattened to [N, 64] in [0, 1].

    Attributes:
      training: of the eight classes, with ``training_labels``.
      held_out: likewise, with ``held_out_labels``.
      foreign: by name, sets that training never sees.
      orders: [5, 64] the pixel orders of auxiliary outliers, none of them that of ``foreign``.
    """

    training: np.ndarray
    training_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    foreign: dict[str, np.ndarray]
    orders: np.ndarray


def load_sets(num_training: int, seed: int) -> Sets:
    """scikit-learn's digits, split at random, and the sets made of them."""
    from sklearn.datasets import load_digits

    generator = np.random.default_rng(seed)
    digits = load_digits()
    images, labels = (digits.data / 16.0).astype(np.float32), digits.target.astype(np.int32)
    own = generator.permutation(np.flatnonzero(labels < _NUM_CLASSES))
    training, held_out = own[:num_training], own[num_training:]
    test = images[held_out]
    order, *orders = (generator.permutation(_NUM_PIXELS) for _ in range(1 + _NUM_OTHER_ORDERS))
    partners = generator.permutation(len(test))
    turned = np.rot90(test.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, _NUM_PIXELS)
    foreign = {
        "digits_8_9": images[labels >= _NUM_CLASSES],
        "permuted": test[:, order],
        "uniform": generator.uniform(size=test.shape).astype(np.float32),
        "mixed": 0.5 * (test + test[partners]),
        "turned": np.ascontiguousarray(turned),
    }
    return Sets(
        images[training], labels[training], test, labels[held_out], foreign, np.stack(orders)
    )


def corrupt(image: jax.Array, kind: jax.Array, orders: jax.Array) -> jax.Array:
    """[64] a training image made foreign: in another pixel order, shifted by 4 rows, or flipped."""
    square = image.reshape(8, 8)
    shifted, flipped = jnp.roll(square, 4, axis=0).ravel(), square[::-1].ravel()
    made = jnp.concatenate([image[orders], shifted[None], flipped[None]])
    return made[kind]


def build(config: EnergyOodConfig) -> Run:
    """Makes the run of a config."""
    sets = load_sets(config.num_training, config.seed)
    classifier = mlp_classifier(_NUM_CLASSES, config.hidden_features, activation=jax.nn.relu)
    num_training = len(sets.training)

    def example(arrays, key, position):
        images, labels, orders = arrays
        own = shuffled_index(key, position, num_training)
        index_key, kind_key = jax.random.split(jax.random.fold_in(key, position))
        shape = (config.outliers_per_example,)
        index = jax.random.randint(index_key, shape, 0, num_training)
        kinds = jax.random.randint(kind_key, shape, 0, _NUM_CORRUPTIONS)
        outliers = jax.vmap(corrupt, (0, 0, None))(images[index], kinds, orders)
        return OutlierBatch(images[own], labels[own], outliers)

    objective = energy_bounded(
        classifier.apply,
        weight=config.hinge_weight,
        margin_out=config.margin_out,
        margin_in_offset=config.margin_in_offset,
        num_pretraining_steps=config.num_pretraining_steps,
        axis_name=AXIS_NAME,
    )
    schedule = optax.join_schedules(
        [
            optax.constant_schedule(config.learning_rate),
            optax.cosine_decay_schedule(config.learning_rate, config.num_fine_tuning_steps),
        ],
        [config.num_pretraining_steps],
    )
    logits_of = jax.jit(jax.vmap(classifier.apply, (None, 0)))

    def scores_of(state: TrainState, images) -> dict[str, np.ndarray]:
        """By name [N], in float64: the higher, the more foreign."""
        logits = np.asarray(logits_of(state.ema, images), np.float64)
        peak = logits.max(axis=1)
        is_peak = np.arange(_NUM_CLASSES) == logits.argmax(axis=1)[:, None]
        # Without the peak's own 1, the many images whose p_max rounds to 1 are kept apart.
        others = np.where(is_peak, 0.0, np.exp(logits - peak[:, None])).sum(axis=1)
        surprise = np.log1p(others)
        return {"energy": -peak - surprise, "msp": surprise}

    def sample(key, state: TrainState, num_samples: int):
        """Nothing is drawn here: held-out and foreign images with their scores."""
        del key
        drawn = {}
        for name, images in {"held_out": sets.held_out, **sets.foreign}.items():
            chosen = images[:num_samples]
            drawn[f"images_{name}"] = chosen.reshape(-1, 8, 8)
            drawn[f"energies_{name}"] = scores_of(state, chosen)["energy"]
        return drawn

    def evaluate(key, state: TrainState):
        from ebjax.evaluation import classification_figures, out_of_distribution_figures

        del key
        logits = np.asarray(logits_of(state.ema, sets.held_out))
        own = scores_of(state, sets.held_out)
        figures = {
            **classification_figures(logits, sets.held_out_labels),
            "energy_training": float(scores_of(state, sets.training)["energy"].mean()),
            "energy_held_out": float(own["energy"].mean()),
            "is_fine_tuned": float(state.step > config.num_pretraining_steps),
        }
        for name, images in sets.foreign.items():
            foreign = scores_of(state, images)
            figures[f"energy_{name}"] = float(foreign["energy"].mean())
            for score in ("msp", "energy"):
                found = out_of_distribution_figures(own[score], foreign[score])
                figures[f"fpr95_{score}_{name}"] = found["fpr95"]
                figures[f"auroc_{score}_{name}"] = found["auroc"]
        return figures

    def figures(key, state: TrainState, samples):
        from ebjax.figures import energy_histogram, image_grids, roc_curves

        del key
        own = scores_of(state, sets.held_out)
        foreign = {name: scores_of(state, images) for name, images in sets.foreign.items()}
        rows = [sets.held_out, *sets.foreign.values()]
        title = "rows: " + ", ".join(["held out", *(n.replace("_", " ") for n in foreign)])
        return {
            "images": image_grids(
                {title: np.concatenate([images[:12] for images in rows]).reshape(-1, 8, 8)},
                num_rows=len(rows),
                limits=(0.0, 1.0),
            ),
            "energies": energy_histogram(
                {
                    "held out": own["energy"],
                    **{n.replace("_", " "): s["energy"] for n, s in foreign.items()},
                }
            ),
            "roc": roc_curves(
                {
                    f"{score}, {name.replace('_', ' ')}": (own[score], foreign[name][score])
                    for name in ("digits_8_9", "permuted")
                    for score in ("energy", "msp")
                }
            ),
        }

    return Run(
        init=lambda key: classifier.init(key, jnp.zeros(_NUM_PIXELS)),
        objective=objective,
        optimizer=optax.adamw(schedule, weight_decay=config.weight_decay),
        source=Source(
            (
                jnp.asarray(sets.training),
                jnp.asarray(sets.training_labels),
                jnp.asarray(sets.orders),
            ),
            example,
        ),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        progress=("loss", "accuracy", "energy_in", "energy_out"),
        energy=lambda params, x: free_energy(classifier.apply(params, jnp.ravel(x))),
    )


recipe = Recipe(EnergyOodConfig, build)
