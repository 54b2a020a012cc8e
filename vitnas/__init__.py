"""vitnas: images and a budget in, the Pareto-best vision transformers out."""

__version__ = "0.1.0"
