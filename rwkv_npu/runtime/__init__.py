"""Token ids to logits: weights, the choice of backends, and the engine."""
