"""Trees of species by parsimony, as samples of exp((C - mutations) / α) and not one best tree.

``data_path`` names an alignment (FASTA, or a JSON object of species and sequences); the default is
simulated along a random tree. Up to six species all forests are listed and the law is exact;
beyond, log p of sampled trees comes from backward trajectories.

Zhou et al., "PhyloGFN: phylogenetic inference with generative flow networks", ICLR 2024.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ebjax.training import check_at_least, setting
from ebjax.types import Recipe, Run, TrainState
from gflownet.environments.phylogeny import ForestState, encode_sites, load_alignment, phylogeny
from gflownet.evaluation import correlations, log_probabilities
from gflownet.policies import pair_policy
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import bounds_fn, draw_fn, exact_laws_fn, flow_run
from gflownet.recipes.learners import LEARNERS

__all__ = ["PhylogenyConfig", "newick", "recipe", "simulated_alignment"]

_EXCLUDED = ("mdb", "forward_kl", "led", "tlm")
_NUM_EVALUATED = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhylogenyConfig(FlowConfig):
    """Settings of a run on trees; -1 and 'auto' follow the objective."""

    objective: str = setting("fldb")
    estimates_log_z: bool = setting(True)
    data_path: str = setting("", "alignment, FASTA or JSON; '': simulated")
    num_species: int = setting(6, "the first so many of the file, 0: all; how many to simulate")
    num_sites: int = setting(300, "simulated: letters of a species")
    mutation_rate: float = setting(0.1, "simulated: chance that a letter changes along a branch")
    data_seed: int = setting(0, "simulated: seed")
    temperature: float = setting(4.0, "alpha: mutations that cost one nat")
    width: int = setting(64, "features of a tree in the network")
    num_layers: int = setting(1, "attention blocks over the trees of a forest")
    num_heads: int = setting(4, "of each block")
    backward_policy: str = setting("uniform")
    learning_rate: float = setting(3e-3)
    num_steps: int = setting(3000)
    batch_size: int = setting(32)
    epsilon: float = setting(0.5)
    epsilon_decay_steps: int = setting(1500)
    checkpoint_every: int = setting(1000)
    chunk_size: int = setting(64)

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if self.objective in _EXCLUDED:
            raise ValueError(
                f"objective is {self.objective!r}; trees take any but {', '.join(_EXCLUDED)}."
            )
        super().__post_init__()
        check_at_least(self, 1, "num_sites", "width", "num_heads")
        check_at_least(self, 0, "num_species", "data_seed", "num_layers")
        if not self.data_path and self.num_species < 3:
            raise ValueError(f"num_species is {self.num_species}; simulate at least 3.")
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must divide the width {self.width}."
            )
        for name in ("temperature", "mutation_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")


def simulated_alignment(
    seed: int, *, num_species: int, num_sites: int = 300, mutation_rate: float = 0.1
) -> dict[str, str]:
    """Sequences at the leaves of a random tree, each branch of which changes some letters.

    >>> {name: len(letters) for name, letters in
    ...  simulated_alignment(0, num_species=3, num_sites=5).items()}
    {'species_0': 5, 'species_1': 5, 'species_2': 5}
    """
    rng = np.random.default_rng(seed)

    def evolved(letters):
        changes = rng.random(num_sites) < mutation_rate
        return np.where(changes, (letters + rng.integers(1, 4, num_sites)) % 4, letters)

    lineages = [rng.integers(4, size=num_sites)]
    while len(lineages) < num_species:
        parent = lineages.pop(rng.integers(len(lineages)))
        lineages += [evolved(parent), evolved(parent)]
    return {
        f"species_{place}": "".join("ACGT"[letter] for letter in evolved(letters))
        for place, letters in enumerate(lineages)
    }


def newick(root: np.ndarray, left: np.ndarray, right: np.ndarray, names: list[str]) -> str:
    """A tree as text, as other programs read it.

    Args:
      root: [n], ``left`` [n] and ``right`` [n] of one ``ForestState`` with a single tree.
      left: see there.
      right: see there.
      names: of the n species.

    >>> newick(np.array([3, -1]), np.array([-1, 0]), np.array([-1, 1]), ["a", "b"])
    '(a,b);'
    """
    size = len(names)

    def text(node: int) -> str:
        if node < size:
            return names[node]
        return f"({text(int(left[node - size]))},{text(int(right[node - size]))})"

    return text(int(root[root >= 0][0])) + ";"


def build(config: PhylogenyConfig) -> Run:
    """Makes the run of a config."""
    if config.data_path:
        alignment = load_alignment(config.data_path)
        if config.num_species > len(alignment):
            raise ValueError(
                f"num_species is {config.num_species}; {config.data_path} has {len(alignment)}."
            )
        kept = list(alignment)[: config.num_species or None]
        alignment = {name: alignment[name] for name in kept}
    else:
        alignment = simulated_alignment(
            config.data_seed,
            num_species=config.num_species,
            num_sites=config.num_sites,
            mutation_rate=config.mutation_rate,
        )
    names = list(alignment)
    environment = phylogeny(encode_sites(alignment), temperature=config.temperature)

    def make_policy(config, environment, *, with_flow):
        del environment
        return pair_policy(
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            backward=config.backward_policy,
            with_flow=with_flow,
        )

    learner = LEARNERS[config.objective](config, environment, make_policy)
    draw, bounds = draw_fn(environment, learner), bounds_fn(environment, learner)
    laws = exact_laws_fn(environment, learner)

    def mutations(forest: ForestState) -> np.ndarray:
        return np.asarray(forest.mutations).sum(axis=1)

    def sample(key, state: TrainState, num_samples: int):
        drawn = draw(key, state, num_samples)
        parts = [np.asarray(getattr(drawn.terminal, name)) for name in ("root", "left", "right")]
        return {
            "trees": np.array(
                [newick(root, left, right, names) for root, left, right in zip(*parts, strict=True)]
            ),
            "mutations": mutations(drawn.terminal),
            "log_rewards": np.asarray(drawn.log_reward),
        }

    def monitor(key, state: TrainState):
        if laws is not None:
            return {"jensen_shannon": laws(state).figures()["jensen_shannon"]}
        return {"negative_elbo": -bounds(key, state, 200).elbo}

    def pairs(key, state: TrainState):
        """``(log p, log R)`` of all trees, or of those that the flow draws."""
        if laws is not None:
            found = laws(state)
            return np.log(np.maximum(found.learned, 1e-30)), np.log(found.target) + found.log_z
        draw_key, key = jax.random.split(key)
        drawn = draw(draw_key, state, _NUM_EVALUATED)
        params = learner.policy_params(state.ema)
        log_p = log_probabilities(
            key, environment, learner.policy, params, drawn.terminal, num_samples=32
        )
        return log_p, np.asarray(drawn.log_reward, np.float64)

    def evaluate(key, state: TrainState):
        bound_key, draw_key, pair_key, learned_key = jax.random.split(key, 4)
        estimate = bounds(bound_key, state, _NUM_EVALUATED)
        drawn = draw(draw_key, state, _NUM_EVALUATED)
        found_mutations = mutations(drawn.terminal)
        figures_ = {
            "log_z": float(learner.log_z(learned_key, state.ema)),
            "elbo": estimate.elbo,
            "importance_log_z": estimate.log_z,
            "importance_log_z_standard_error": estimate.log_z_standard_error,
            "fewest_mutations": int(found_mutations.min()),
            "mean_mutations": float(found_mutations.mean()),
            **correlations(*pairs(pair_key, state)),
        }
        if laws is not None:
            found = laws(state)
            figures_ |= {
                "log_z_error": abs(figures_["log_z"] - found.log_z),
                "elbo_gap": found.log_z - estimate.elbo,
                **found.figures(),
            }
        return figures_

    def figures(key, state: TrainState, samples):
        from gflownet.figures import probabilities_and_rewards

        log_p, log_r = pairs(key, state)
        laws_now = None if laws is None else laws(state)
        return {
            "rewards": probabilities_and_rewards(
                log_p,
                log_r,
                samples["log_rewards"],
                log_z=environment.log_z,
                learned=None if laws_now is None else laws_now.learned,
                target=None if laws_now is None else laws_now.target,
            )
        }

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_elbo" if laws is None else "jensen_shannon",
    )


recipe = Recipe(PhylogenyConfig, build, seed_is_key=True)
