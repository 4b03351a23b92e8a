"""AsyPPO on Megatron-Core: a large actor guided by an ensemble of mini-critics (arXiv 2510.01656)."""

__version__ = "0.1.0"
