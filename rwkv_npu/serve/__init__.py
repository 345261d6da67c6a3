"""The server: HTTP requests to events, many conversations on one model.

scheduler.py   one thread owns the model and steps all sequences in one forward
cache.py       states of what was read
"""
