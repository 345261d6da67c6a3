"""Files: checkpoints, bundles, states, and how they are written whole or not at all."""
