"""Convolutional networks as energies of images, without normalisation.

    plain       3x3 convolutions, each after the first halving the resolution, then a dense layer
    residual    h <- shortcut(h) + conv(a(conv(a(h)))), halved by average pooling, mean over places

Batch normalisation is left out on purpose: the energy of an image must not depend on the others in
its batch. Average pooling keeps the gradient in x smooth, where a maximum has kinks. Every weight
is a plain kernel, so spectral normalisation applies to the params as they are.

Shapes: ``x`` is one image [height, width, channels].

Du and Mordatch, "Implicit generation and modeling with energy based models", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebjax.energies.adapters import from_linen
from ebjax.energies.joint import Classifier, classifier_from_linen
from ebjax.energies.networks.multilayer import check_widths
from ebjax.types import Energy

__all__ = [
    "check_image",
    "convolutional_energy",
    "residual_classifier",
    "residual_energy",
]


def check_image(x: jax.Array) -> None:
    """Raises ``ValueError`` unless ``x`` is one image [height, width, channels]."""
    if jnp.ndim(x) != 3:
        raise ValueError(
            f"An example has shape {jnp.shape(x)}; give one image as [height, width, channels]."
        )


class _Convolutional(nn.Module):
    features: tuple[int, ...]
    dense_features: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        check_image(x)
        for layer, width in enumerate(self.features):
            # The first layer keeps the resolution, each later one halves it.
            strides = (1, 1) if layer == 0 else (2, 2)
            x = self.activation(nn.Conv(width, (3, 3), strides)(x))
        x = jnp.ravel(x)
        if self.dense_features:
            x = self.activation(nn.Dense(self.dense_features)(x))
        return nn.Dense(1)(x)[0]


def convolutional_energy(
    features: Sequence[int] = (64, 128, 256),
    *,
    dense_features: int = 256,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A convolutional network on one image [height, width, channels], without normalisation.

    3x3 convolutions; the first at full resolution, each later one at half of the last; then a
    dense layer on the flattened map.

    Args:
      features: channels of the convolutions.
      dense_features: width of the dense layer, 0 for none.
      activation: elementwise.
    """
    features = check_widths("features", features)
    return from_linen(_Convolutional(features, dense_features, activation))


class _Block(nn.Module):
    features: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = nn.Conv(self.features, (1, 1), use_bias=False, name="shortcut")(x)
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3))(self.activation(x))
        return shortcut + x


class _Residual(nn.Module):
    features: tuple[int, ...]
    blocks_per_stage: int
    activation: Callable[[jax.Array], jax.Array]
    num_outputs: int = 1

    @nn.compact
    def __call__(self, x):
        check_image(x)
        x = nn.Conv(self.features[0], (3, 3), name="stem")(x)
        for stage, width in enumerate(self.features):
            if stage and min(x.shape[:2]) > 1:
                # An odd edge is averaged over what there is of it.
                x = nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
            for _ in range(self.blocks_per_stage):
                x = _Block(width, self.activation)(x)
        x = self.activation(x).mean(axis=(0, 1))
        return nn.Dense(self.num_outputs)(x)


def _make_residual(features, blocks_per_stage, activation, num_outputs) -> _Residual:
    if blocks_per_stage < 1:
        raise ValueError(f"blocks_per_stage is {blocks_per_stage}; it must be at least 1.")
    features = check_widths("features", features, minimum=1)
    return _Residual(features, blocks_per_stage, activation, num_outputs)


def residual_energy(
    features: Sequence[int] = (64, 128, 128),
    *,
    blocks_per_stage: int = 1,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A residual network on one image [height, width, channels], without normalisation.

    Args:
      features: channels of the stages; each stage after the first has half the resolution.
      blocks_per_stage: residual blocks of two convolutions in each.
      activation: elementwise, before each convolution.

    Raises:
      ValueError: naming the argument that is out of range; in ``init`` and ``apply``, if an
        example is not one image.

    >>> energy = residual_energy((4, 8))
    >>> image = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
    >>> params = jax.eval_shape(energy.init, jax.random.key(0), image)
    >>> sorted(params)
    ['Dense_0', '_Block_0', '_Block_1', 'stem']
    """
    return from_linen(_make_residual(features, blocks_per_stage, activation, 1))


def residual_classifier(
    num_classes: int,
    features: Sequence[int] = (64, 128, 128),
    *,
    blocks_per_stage: int = 1,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Classifier:
    """``residual_energy`` with one logit a class; ``joint_energy`` reads energies off it."""
    module = _make_residual(features, blocks_per_stage, activation, num_classes)
    return classifier_from_linen(module, num_classes)
