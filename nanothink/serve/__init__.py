"""A server of trained models that speaks the API of OpenAI, and a playground in the browser.

Needs the extra ``serve`` (Starlette, uvicorn). ``server.serve`` runs it.
"""
