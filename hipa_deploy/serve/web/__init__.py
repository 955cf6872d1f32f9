"""The HTTP door of the image service: OpenAI's images API, its own API, guards, logs, the command.

May import ``hipa_deploy.serve`` and what that may import. FastAPI and uvicorn are imported here and
nowhere else.
"""
