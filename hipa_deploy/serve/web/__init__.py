"""The HTTP door of the image service: OpenAI's images API, its own API, a page, guards, logs.

May import ``hipa_deploy.serve`` and what that may import. FastAPI is imported here and in no lower
room.
"""
