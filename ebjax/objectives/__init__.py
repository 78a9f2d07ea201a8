"""Objectives: what a training step of an energy minimises."""

from ebjax.objectives.contrastive_divergence import (
    PersistentChains,
    contrastive_loss,
    persistent_contrastive_divergence,
)

__all__ = ["PersistentChains", "contrastive_loss", "persistent_contrastive_divergence"]
