"""HyperDFlash: block-parallel speculative drafting for targets with hyper-connections."""
