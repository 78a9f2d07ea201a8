"""Normalising flows: laws with exact draws and exact densities, to be noise for an energy.

    x = f(z), z ~ N(0, I),    log q(x) = log N(f⁻¹(x); 0, I) + log |det ∂f⁻¹/∂x|

f is a chain of coupling layers: each leaves half of the coordinates as they are and moves the other
half by a monotone map whose parameters a network reads off the first half, so that f, its inverse
and its determinant cost the same. The last layer of each network starts at zero, and so f starts as
the identity (times the scale, plus the location).

Needs distrax, which is imported when a flow is first evaluated.

Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP", ICLR 2017. Durkan, Bekasov,
Murray and Papamakarios, "Neural spline flows", NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.types import Energy, Params, bind

__all__ = ["COUPLINGS", "Flow", "coupling_flow", "flow_energy"]

COUPLINGS = ("affine", "spline")


class Flow(NamedTuple):
    """A parametric law with exact draws and a normalised density; functions of one example.

    Attributes:
      init: ``(key, x) -> params``, given one example (its values do not matter).
      log_prob: ``(params, x) -> []``.
      sample: ``(params, key) -> x``, differentiable in ``params``.
    """

    init: Callable[[jax.Array, jax.Array], Params]
    log_prob: Callable[[Params, jax.Array], jax.Array]
    sample: Callable[[Params, jax.Array], jax.Array]


class _Conditioner(nn.Module):
    """Parameters of the map of each coordinate, [D, P], from the masked coordinates [D]."""

    features: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        for width in self.features:
            x = nn.silu(nn.Dense(width)(x))
        zeros = nn.initializers.zeros_init()
        x = nn.Dense(size * self.num_outputs, kernel_init=zeros, bias_init=zeros)(x)
        return x.reshape(size, self.num_outputs)


def coupling_flow(
    shape: tuple[int, ...],
    *,
    num_layers: int = 8,
    features: Sequence[int] = (64, 64),
    coupling: str = "spline",
    num_bins: int = 8,
    bound: float = 4.0,
    location: npt.ArrayLike = 0.0,
    scale: npt.ArrayLike = 1.0,
) -> Flow:
    """A flow of coupling layers on arrays of a shape, taken as vectors.

    Layers move the even and the odd coordinates in turn. A single coordinate is moved by every
    second layer, by a map of constant parameters.

    Args:
      shape: of one example.
      num_layers: at least 2, so that every coordinate moves.
      features: widths of the hidden layers of each network.
      coupling: ``"affine"`` (x e^s + t, with s in (-2, 2)) or ``"spline"`` (a monotone
        rational-quadratic spline on [-bound, bound], linear beyond with the slope at the end).
      num_bins: pieces of a spline.
      bound: half the width of a spline, in units of ``scale``.
      location: mean of the law that it starts as, [] or the shape of an example.
      scale: standard deviation of it, likewise, positive.

    Returns:
      A ``Flow``; its ``init`` takes any example of the shape.

    Raises:
      ValueError: naming the option that is out of range.

    >>> flow = coupling_flow((2,), num_layers=2, features=(8,), coupling="affine")
    >>> params = flow.init(jax.random.key(0), jnp.zeros(2))
    >>> round(float(flow.log_prob(params, jnp.zeros(2))), 4)  # -log 2π
    -1.8379
    """
    if num_layers < 2:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 2.")
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling is {coupling!r}; it must be one of {', '.join(COUPLINGS)}.")
    if num_bins < 2:
        raise ValueError(f"num_bins is {num_bins}; a spline has at least 2.")
    if not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"bound is {bound}; it must be a positive number.")
    if math.prod(shape) < 1:
        raise ValueError(f"shape is {shape}; an example has at least one number.")
    settings = _Settings(
        module=_Conditioner(tuple(features), 2 if coupling == "affine" else 3 * num_bins + 1),
        shape=tuple(shape),
        num_layers=num_layers,
        coupling=coupling,
        bound=bound,
        location=_frame("location", location, shape),
        scale=_frame("scale", scale, shape),
    )
    if min(settings.scale) <= 0.0:
        raise ValueError(f"scale is {scale!r}; all of it must be positive.")
    return Flow(
        bind(_init, settings=settings),
        bind(_log_prob, settings=settings),
        bind(_sample, settings=settings),
    )


class _Settings(NamedTuple):
    """What a flow is, beside its parameters; hashable, so that equal flows are equal."""

    module: _Conditioner
    shape: tuple[int, ...]
    num_layers: int
    coupling: str
    bound: float
    location: tuple[float, ...]
    scale: tuple[float, ...]


def _frame(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> tuple[float, ...]:
    """One number, or one a coordinate."""
    array = np.asarray(values, float)
    if array.shape not in ((), tuple(shape)) or not np.isfinite(array).all():
        raise ValueError(
            f"{name} has shape {array.shape}; it must be one finite number or finite numbers of "
            f"the shape {tuple(shape)} of an example."
        )
    return tuple(array.ravel().tolist())


def _init(key, x, *, settings: _Settings):
    if jnp.shape(x) != settings.shape:
        raise ValueError(f"x has shape {jnp.shape(x)}; the flow has shape {settings.shape}.")
    dummy = jnp.zeros(math.prod(settings.shape))
    keys = jax.random.split(key, settings.num_layers)
    return [settings.module.init(layer_key, dummy)["params"] for layer_key in keys]


def _distribution(params, settings: _Settings) -> Any:
    """The flow of these parameters as a distrax distribution over vectors."""
    import distrax

    size = math.prod(settings.shape)
    dtype = jnp.result_type(*jax.tree.leaves(params))

    def bijector_fn(outputs):
        if settings.coupling == "affine":
            # Bounded, so that no layer can squeeze its input to a point in float32.
            log_scale = 2.0 * jnp.tanh(0.5 * outputs[..., 0])
            return distrax.ScalarAffine(shift=outputs[..., 1], log_scale=log_scale)
        return distrax.RationalQuadraticSpline(outputs, -settings.bound, settings.bound)

    def layer(index):
        def conditioner(masked):
            return settings.module.apply({"params": params[index]}, masked)

        is_kept = np.arange(size) % 2 == index % 2
        return distrax.MaskedCoupling(jnp.asarray(is_kept), conditioner, bijector_fn)

    frame = distrax.ScalarAffine(
        shift=jnp.broadcast_to(jnp.asarray(settings.location, dtype), (size,)),
        scale=jnp.broadcast_to(jnp.asarray(settings.scale, dtype), (size,)),
    )
    # The chain applies its last member first.
    layers = [layer(index) for index in reversed(range(settings.num_layers))]
    base = distrax.MultivariateNormalDiag(jnp.zeros(size, dtype), jnp.ones(size, dtype))
    return distrax.Transformed(base, distrax.Chain([distrax.Block(frame, 1), *layers]))


def _log_prob(params, x, *, settings: _Settings):
    return _distribution(params, settings).log_prob(x.reshape(-1))


def _sample(params, key, *, settings: _Settings):
    return _distribution(params, settings).sample(seed=key).reshape(settings.shape)


def flow_energy(flow: Flow) -> Energy:
    """``E = -log q``: a flow as an energy, with log Z = 0.

    >>> flow = coupling_flow((1,), num_layers=2, features=(4,))
    >>> energy = flow_energy(flow)
    >>> round(float(energy.apply(energy.init(jax.random.key(0), jnp.zeros(1)), jnp.zeros(1))), 4)
    0.9189
    """
    return Energy(flow.init, bind(_negative_log_prob, flow=flow))


def _negative_log_prob(params, x, *, flow):
    return -flow.log_prob(params, x)
