"""What learns: samples, advantages, losses, the policy and its adapter, the warm start, checkpoints."""
