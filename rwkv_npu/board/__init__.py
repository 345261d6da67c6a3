"""The machine underneath: which chip it is, and which process holds its NPU."""
