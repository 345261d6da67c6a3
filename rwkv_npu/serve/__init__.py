"""The HTTP server: many conversations at a time on one model.

app, web, run          the ASGI application, its gate (limits, keys, errors), and its process
openai, responses, ollama, llama, states, page    one module for each API, with its routes
openapi                the document that describes the APIs
request, fields        reading and checking the JSON of a request
service                a request -> jobs of the scheduler -> events of its answers
scheduler              one thread owns the model and steps all sequences in one forward
answers, structured    one answer: sample its tokens, parse its text, hold it to a JSON schema
cache, stores          states after prefixes of prompts: in memory, and in a folder or in Redis
batch                  requests from a file, without a network
"""
