"""The OpenAI-compatible server and its page.

A request becomes an order, the engine answers the order, and its answers go out as chunks:

    command.py              `dpa serve`: options, loading, the server's life
    connections.py          limits on open connections, and on the time that a request's head takes
    guard.py                key, host, body size, clients that leave, and the count of requests
    app.py                  the routes
    shapes.py               OpenAI's requests, responses and errors
    logs.py                 at most one line a second of each kind that clients can cause; no query strings
    metrics.py              the counters of /metrics
    service.py              request -> order -> answers; the line that requests wait in
    engine.py               the engine protocol; limits; the reward model
    transformers_engine.py  the engine on transformers
    vllm_engine.py          the engine on vLLM
    text.py                 chats to tokens, tokens to text
"""
