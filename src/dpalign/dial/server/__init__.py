"""The OpenAI-compatible server and its page.

A request becomes an order, the engine answers the order, and its answers go out as chunks:

    command.py              `dpa serve`: options, loading, the server's life
    connections.py          how many connections are open, and how long one may take to ask
    guard.py                key, host, body size, clients that leave, and the count of requests
    app.py                  the routes
    shapes.py               OpenAI's requests, responses and errors
    logs.py                 one line a second for what strangers can cause; no query strings
    service.py              request -> order -> answers; the line that requests wait in; metrics
    engine.py               what an engine is; limits; the reward model
    transformers_engine.py  the engine on transformers
    vllm_engine.py          the engine on vLLM
    text.py                 chats to tokens, tokens to text
"""
