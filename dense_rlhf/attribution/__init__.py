"""Which tokens earned the score: `attribute` explains a whole rollout; `SOURCES` lists how."""

from dense_rlhf.attribution.sources import SOURCES, attribute, available

__all__ = ["SOURCES", "attribute", "available"]
