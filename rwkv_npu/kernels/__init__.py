"""Code that is compiled on the machine it runs on, by numba (extra `fast`): no compiler, no build step."""
