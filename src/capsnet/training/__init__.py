"""Training a network: what a run does, from its configuration to its report."""
