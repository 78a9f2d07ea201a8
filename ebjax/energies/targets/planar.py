"""Laws in the plane, most of them about its origin: rings, moons, a pinwheel, a checkerboard."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.targets.tabulated import TabulatedLaw, tabulate
from ebjax.types import Moments, Target

__all__ = ["checkerboard", "pinwheel", "ring", "rings", "two_moons"]

_LOG_2PI = math.log(2.0 * math.pi)
# The pinwheel winds no more from here on: 30 deviations out, and e^|x| would overflow.
_LAST_WINDING = 10.0


def _radius(x: jax.Array) -> jax.Array:
    """|x| in 2-D, with gradient zero and not NaN at the origin."""
    square = jnp.square(x[0]) + jnp.square(x[1])
    is_positive = square > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1.0)), 0.0)


def _radial_law(radius: float, deviation: float) -> TabulatedLaw:
    """The law of |x| where ``E = (|x| - R)² / (2σ²)`` in 2-D: density ∝ r exp(-(r - R)² / 2σ²)."""
    if not radius > 0 or not deviation > 0:
        raise ValueError(f"radius is {radius} and its deviation {deviation}; both are positive.")

    def energy(r):
        with np.errstate(divide="ignore"):
            return 0.5 * ((r - radius) / deviation) ** 2 - np.log(r)

    return tabulate(energy, max(0.0, radius - 12.0 * deviation), radius + 12.0 * deviation)


def ring(radius: float = 2.0, standard_deviation: float = 0.4) -> Target:
    """``E(x) = (|x| - R)² / (2σ²)`` in 2-D: a circle of modes about a hole.

    By default E = (|x| - 2)² / 0.32, the ring of Li and Wang, "Neural network renormalization
    group", Physical Review Letters 121 (2018). Radii are drawn by inverting their tabulated
    distribution function.

    Raises:
      ValueError: if the radius or the deviation is not positive.
    """
    law = _radial_law(radius, standard_deviation)

    def energy(params, x):
        del params
        return 0.5 * jnp.square((_radius(x) - radius) / standard_deviation)

    def sample(key):
        radius_key, angle_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, maxval=2.0 * math.pi)
        return law.sample(radius_key) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    covariance = 0.5 * law.mean(np.square) * np.eye(2)
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=math.log(2.0 * math.pi) + law.log_z,
        sample=sample,
        moments=Moments(jnp.zeros(2), jnp.asarray(covariance)),
    )


def rings(
    radii: tuple[float, ...] = (0.75, 1.5, 2.25, 3.0), standard_deviation: float = 0.08
) -> Target:
    """Circles about the origin, each equally likely, with round Gaussian noise on their points.

        x = R_k (cos φ, sin φ) + σ z
        p(x) = mean_k exp(-(|x|² + R_k²) / (2σ²)) I₀(|x| R_k / σ²) / (2πσ²)

    φ uniform, z standard normal, I₀ the modified Bessel function that the integral over φ gives.
    Normalised, so ``log Z = 0``; covariance ``(mean_k R_k² / 2 + σ²) I``. By default the four
    circles of Grathwohl et al., "FFJORD", ICLR 2019.

    Args:
      radii: R_k, all positive.
      standard_deviation: σ of the noise.

    Raises:
      ValueError: if there is no radius, or one or the deviation is not positive.
    """
    if not radii or not min(radii) > 0 or not standard_deviation > 0:
        raise ValueError(
            f"radii are {radii} and their deviation {standard_deviation}; there must be at least "
            "one radius, and all are positive."
        )
    variance = standard_deviation**2
    constant = math.log(len(radii)) + _LOG_2PI + math.log(variance)

    def energy(params, x):
        del params
        r, circles = _radius(x), jnp.asarray(radii, x.dtype)
        # I₀ without its growth e^z, which makes the square (r - R)² complete.
        log_bessel = jnp.log(jax.scipy.special.i0e(r * circles / variance))
        log_densities = log_bessel - 0.5 * jnp.square(r - circles) / variance
        return constant - jax.nn.logsumexp(log_densities)

    def sample(key):
        circle_key, angle_key, noise_key = jax.random.split(key, 3)
        radius = jax.random.choice(circle_key, jnp.asarray(radii, float))
        angle = jax.random.uniform(angle_key, maxval=2.0 * math.pi)
        noise = standard_deviation * jax.random.normal(noise_key, (2,))
        return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)]) + noise

    covariance = (0.5 * np.mean(np.square(radii)) + variance) * np.eye(2)
    return Target(
        energy, (2,), 0.0, sample, Moments(jnp.zeros(2), jnp.asarray(covariance)), modes=None
    )


def pinwheel(
    num_arms: int = 5,
    radial_deviation: float = 0.3,
    tangential_deviation: float = 0.1,
    rate: float = 0.25,
) -> Target:
    """Arms about the origin that wind as they go out: an exact form of the pinwheel data.

        f ~ N((1, 0), diag(σ_r², σ_t²)),  x = R(2πk / K + rate e^|f|) f,  k uniform of K arms
        p(x) = mean_k N(R(-(2πk / K + rate e^|x|)) x; (1, 0), diag(σ_r², σ_t²))

    R(a) turns by the angle a. In polar coordinates the map is (r, φ) -> (r, φ + a(r)), which keeps
    area and is undone by turning back, since |x| = |f|; so the density is that of the Gaussians,
    ``log Z = 0``. The data set as usually made winds by ``rate e^{f_0}``: that map has the
    Jacobian ``1 - rate e^{f_0} f_1``, which changes sign, and no inverse in closed form. Near the
    arm's axis, f_1 = 0, both are the same up to second order in f_1.

    Johnson et al., "Composing graphical models with neural networks for structured
    representations and fast inference", NeurIPS 2016, for the data.

    Args:
      num_arms: K, at least 3, which makes the mean zero and the covariance round.
      radial_deviation: σ_r, along an arm.
      tangential_deviation: σ_t, across it.
      rate: of winding, in radians.

    Raises:
      ValueError: if there are less than 3 arms, or a deviation is not positive.
    """
    if num_arms < 3 or not radial_deviation > 0 or not tangential_deviation > 0:
        raise ValueError(
            f"num_arms is {num_arms} and the deviations are {radial_deviation} and "
            f"{tangential_deviation}; there must be at least 3 arms, and both are positive."
        )
    deviations = np.array([radial_deviation, tangential_deviation])
    angles = 2.0 * np.pi * np.arange(num_arms) / num_arms
    constant = math.log(num_arms) + _LOG_2PI + math.log(deviations.prod())

    def turn(angle, x):
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([cosine * x[0] - sine * x[1], sine * x[0] + cosine * x[1]])

    def wind(x):
        return rate * jnp.exp(jnp.minimum(_radius(x), _LAST_WINDING))

    def energy(params, x):
        del params
        back = -(jnp.asarray(angles, x.dtype) + wind(x))
        features = turn(back, x)  # [2, K]
        scaled = (features - jnp.array([[1.0], [0.0]], x.dtype)) / jnp.asarray(
            deviations[:, None], x.dtype
        )
        return constant - jax.nn.logsumexp(-0.5 * jnp.sum(jnp.square(scaled), axis=0))

    def sample(key):
        arm_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (2,))
        feature = jnp.array([1.0, 0.0]) + jnp.asarray(deviations, noise.dtype) * noise
        angle = jax.random.choice(arm_key, jnp.asarray(angles, noise.dtype))
        return turn(angle + wind(feature), feature)

    covariance = 0.5 * (1.0 + np.sum(deviations**2)) * np.eye(2)
    mode_angles = angles + rate * math.e
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=0.0,
        sample=sample,
        moments=Moments(jnp.zeros(2), jnp.asarray(covariance)),
        modes=jnp.asarray(np.stack([np.cos(mode_angles), np.sin(mode_angles)], axis=-1)),
    )


def two_moons(
    radius: float = 2.0, radial_deviation: float = 0.4, horizontal_deviation: float = 0.6
) -> Target:
    """Two facing crescents in 2-D, left and right on a circle of radius R.

        E(x) = (|x| - R)² / (2σ²) - log(exp(-(x0 - R)² / (2s²)) + exp(-(x0 + R)² / (2s²)))

    By default the first energy of Rezende and Mohamed, "Variational inference with normalizing
    flows", ICML 2015; deviations 0.2 and 0.3 give the sharper one of the ``normflows`` package.

    ``log Z`` and moments come from quadrature in polar coordinates. Samples are exact: the ring's,
    kept with the probability exp(-(x0 - R)² / (2s²)), then mirrored by a coin.

    Raises:
      ValueError: if the radius or a deviation is not positive.
    """
    if not horizontal_deviation > 0:
        raise ValueError(f"horizontal_deviation is {horizontal_deviation}; it must be positive.")
    circle = ring(radius, radial_deviation)
    law = _radial_law(radius, radial_deviation)
    precision = 1.0 / horizontal_deviation**2

    def energy(params, x):
        pull = radius * precision * x[0]
        return (
            circle.energy(params, x)
            + 0.5 * precision * (jnp.square(x[0]) + radius**2)
            - jnp.logaddexp(pull, -pull)
        )

    def sample(key):
        coin_key, key = jax.random.split(key)

        def propose(attempt):
            ring_key, accept_key = jax.random.split(jax.random.fold_in(key, attempt))
            x = circle.sample(ring_key)
            log_keep = -0.5 * precision * jnp.square(x[0] - radius)
            return attempt + 1, x, jnp.log(jax.random.uniform(accept_key)) < log_keep

        _, x, _ = jax.lax.while_loop(
            lambda loop: ~loop[2], lambda loop: propose(loop[0]), propose(jnp.int32(0))
        )
        side = jnp.where(jax.random.bernoulli(coin_key), 1.0, -1.0)
        return jnp.stack([side.astype(x.dtype) * x[0], x[1]])

    # Periodic in the angle, so equal steps converge as fast as along the radius.
    angles = np.linspace(0.0, 2.0 * np.pi, 512, endpoint=False)
    coarse = slice(None, None, 10)  # 2,001 radii are plenty
    r, weights = law.grid[coarse, None], law.weights[coarse, None]
    x0, x1 = r * np.cos(angles), r * np.sin(angles)
    # Both crescents weigh the same, so one is enough, and twice its weight.
    terms = weights / weights.sum() * np.exp(-0.5 * precision * (x0 - radius) ** 2) / angles.size
    second = [float((terms * x**2).sum() / terms.sum()) for x in (x0, x1)]
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=float(circle.log_z + np.log(2.0 * terms.sum())),
        sample=sample,
        moments=Moments(jnp.zeros(2), jnp.diag(jnp.array(second))),
        modes=jnp.array([[-radius, 0.0], [radius, 0.0]]),
    )


def checkerboard(num_cells: int = 4, side: float = 2.0) -> Target:
    """Uniform on every second square of a board in 2-D: ``E = 0`` there and ``+inf`` elsewhere.

    By default the board [-4, 4]² with 4 by 4 squares. Its gradient is zero where it exists, so
    only what tolerates infinite energies can sample it.

    Args:
      num_cells: squares along one edge, at least 2.
      side: of one square.

    Raises:
      ValueError: if there are less than 2 squares, or the side is not positive.
    """
    if num_cells < 2 or not side > 0:
        raise ValueError(
            f"num_cells is {num_cells} and side {side}; there must be at least 2 squares "
            "along an edge, and their side must be positive."
        )
    half = 0.5 * num_cells * side
    cells = np.array([c for c in np.ndindex(num_cells, num_cells) if sum(c) % 2 == 0])
    corners = side * cells - half

    def energy(params, x):
        del params
        cell = jnp.floor((x + half) / side)
        is_on_board = jnp.all((cell >= 0) & (cell < num_cells))
        is_filled = is_on_board & (jnp.mod(jnp.sum(cell), 2.0) == 0)
        return jnp.where(is_filled, jnp.zeros((), x.dtype), jnp.inf)

    def sample(key):
        cell_key, place_key = jax.random.split(key)
        corner = jax.random.choice(cell_key, jnp.asarray(corners))
        return corner + side * jax.random.uniform(place_key, (2,))

    covariance = np.cov(corners.T, bias=True) + side**2 / 12.0 * np.eye(2)
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=math.log(len(cells) * side**2),
        sample=sample,
        moments=Moments(jnp.asarray(corners.mean(0) + 0.5 * side), jnp.asarray(covariance)),
    )
