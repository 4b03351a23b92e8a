"""Fused operators in Triton, each beside its plain-torch reference; `policy.choose` decides between them."""
