"""The HTTP server: many conversations at a time on one model.

app, web, run          the ASGI application, its gate (limits, keys, errors), and its process
openai, responses, ollama, llama, states, page    one module an API, each with its routes
request, fields        read and check the JSON of a request
service                a request -> jobs of the scheduler -> events of its answers
scheduler              one thread owns the model and steps all sequences in one forward
answers, structured    sample, parse and restrict one answer
cache, disk            states after prefixes of prompts, in memory and in a folder
batch                  requests from a file, without a network
"""
