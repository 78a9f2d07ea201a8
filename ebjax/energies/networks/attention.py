"""Energies with attention: a small vision transformer, and energies of sets.

    block    h <- h + Attention(norm(h)),  h <- h + MLP(norm(h))
    set      E({x_1, ..., x_n}) = ρ(mean_i h_i, log(1 + n)),  h after a dense layer and L blocks

Layer normalisation acts within one element of one example. A set has no order: permuting its
elements changes nothing. With L = 0 the elements meet only in the mean (deep sets); with L > 0
pairs of them interact. Elements that are masked out are read by nothing, and may hold anything.

Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021. Zaheer et al., "Deep sets", NeurIPS
2017. Lee et al., "Set transformer", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebjax.energies.adapters import from_linen
from ebjax.energies.joint import Classifier, classifier_from_linen
from ebjax.energies.networks.convolutional import check_image
from ebjax.energies.networks.multilayer import check_widths
from ebjax.types import Energy

__all__ = [
    "AttentionBlock",
    "check_heads",
    "masked_mean_and_count",
    "set_energy",
    "vision_transformer_classifier",
    "vision_transformer_energy",
]


class AttentionBlock(nn.Module):
    """``h`` [N, F] to [N, F]; elements that ``mask`` [N] leaves out are read by none.

    Attributes:
      num_heads: divides F.
      activation: elementwise, in the perceptron.
      inner_width: of the perceptron; ``None``: 2 F.
    """

    num_heads: int
    activation: Callable[[jax.Array], jax.Array]
    inner_width: int | None = None

    @nn.compact
    def __call__(self, h, mask=None):
        """One block."""
        width = h.shape[-1]
        inner_width = 2 * width if self.inner_width is None else self.inner_width
        attention = nn.MultiHeadDotProductAttention(self.num_heads)
        allowed = None if mask is None else mask[None, None, :]  # who may be read
        h = h + attention(nn.LayerNorm()(h), mask=allowed)
        inner = self.activation(nn.Dense(inner_width)(nn.LayerNorm()(h)))
        return h + nn.Dense(width)(inner)


class _VisionTransformer(nn.Module):
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    activation: Callable[[jax.Array], jax.Array]
    num_outputs: int = 1

    @nn.compact
    def __call__(self, x):
        check_image(x)
        size = self.patch_size
        if x.shape[0] % size or x.shape[1] % size:
            raise ValueError(
                f"patch_size is {size}; it must divide the image of {x.shape[0]} x {x.shape[1]}."
            )
        x = nn.Conv(self.width, (size, size), (size, size), "VALID", name="patches")(x)
        h = x.reshape(-1, self.width)
        normal = nn.initializers.normal(0.1)
        h = h + self.param("positions", normal, h.shape).astype(h.dtype)
        for _ in range(self.num_layers):
            h = AttentionBlock(self.num_heads, self.activation)(h)
        return nn.Dense(self.num_outputs)(nn.LayerNorm()(h).mean(axis=0))


def check_heads(width: int, num_layers: int, num_heads: int) -> None:
    """Refuses sizes that make no stack of blocks, naming the one that is wrong."""
    if num_layers < 0:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 0.")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide the width {width}.")


def _make_transformer(patch_size, width, num_layers, num_heads, activation, num_outputs):
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; it must be at least 1.")
    check_heads(width, num_layers, num_heads)
    return _VisionTransformer(patch_size, width, num_layers, num_heads, activation, num_outputs)


def vision_transformer_energy(
    *,
    patch_size: int = 2,
    width: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A small vision transformer on one image [height, width, channels].

    Args:
      patch_size: edge of the square patches, pixels; divides height and width.
      width: features of a patch.
      num_layers: attention blocks.
      num_heads: of each; divides ``width``.
      activation: elementwise, in the blocks' perceptrons.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> energy = vision_transformer_energy(width=8, num_layers=1, num_heads=2)
    >>> image = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
    >>> params = jax.eval_shape(energy.init, jax.random.key(0), image)
    >>> params["positions"].shape
    (16, 8)
    """
    return from_linen(_make_transformer(patch_size, width, num_layers, num_heads, activation, 1))


def vision_transformer_classifier(
    num_classes: int,
    *,
    patch_size: int = 2,
    width: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Classifier:
    """``vision_transformer_energy`` with one logit a class."""
    options = (patch_size, width, num_layers, num_heads, activation)
    return classifier_from_linen(_make_transformer(*options, num_classes), num_classes)


def masked_mean_and_count(h: jax.Array, mask: jax.Array) -> jax.Array:
    """[F + 1] mean of the rows of ``h`` [N, F] where ``mask`` [N], and log(1 + their number).

    >>> masked_mean_and_count(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False]))[0]
    Array(2., dtype=float32)
    """
    count = mask.sum().astype(h.dtype)
    total = jnp.where(mask[:, None], h, 0.0).sum(axis=0)
    return jnp.append(total / jnp.maximum(count, 1.0), jnp.log1p(count))


class _Set(nn.Module):
    width: int
    num_layers: int
    num_heads: int
    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x, mask=None):
        if jnp.ndim(x) != 2:
            raise ValueError(f"A set has shape {jnp.shape(x)}; give [elements, numbers of each].")
        mask = jnp.ones(len(x), bool) if mask is None else jnp.asarray(mask, bool)
        if mask.shape != (len(x),):
            raise ValueError(f"mask has shape {mask.shape}; the set has {len(x)} places.")
        # What stands in masked places may be NaN: it must not reach a sum, nor a gradient.
        x = jnp.where(mask[:, None], x, 0.0)
        h = self.activation(nn.Dense(self.width)(x))
        h = nn.Dense(self.width)(h)
        for _ in range(self.num_layers):
            h = AttentionBlock(self.num_heads, self.activation)(h, mask)
        out = masked_mean_and_count(self.activation(h), mask)
        for width in self.features:
            out = self.activation(nn.Dense(width)(out))
        return nn.Dense(1)(out)[0]


def set_energy(
    *,
    width: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    features: Sequence[int] = (64,),
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """An energy of a set of points [N, D]: ``apply(params, x, mask)``, invariant to their order.

    Args:
      width: features of an element.
      num_layers: attention blocks; 0 for deep sets.
      num_heads: of each; divides ``width``.
      features: widths of the layers after the mean.
      activation: elementwise.

    Returns:
      An ``Energy`` whose context is ``mask`` [N] bool, ``True`` where there is an element (all by
      default): sets of many sizes are padded to one. One set of params serves any N.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> energy = set_energy(width=8, num_layers=1, num_heads=2, features=())
    >>> params = energy.init(jax.random.key(0), jnp.zeros((3, 2)))
    >>> x = jnp.array([[0.0, 1.0], [2.0, 3.0], [jnp.nan, 0.0]])
    >>> bool(jnp.isfinite(energy.apply(params, x, jnp.array([True, True, False]))))
    True
    """
    check_heads(width, num_layers, num_heads)
    features = check_widths("features", features)
    return from_linen(_Set(width, num_layers, num_heads, features, activation))
