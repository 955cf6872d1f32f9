"""A web server around one pipeline, with nothing but Python's own http.server.

Needs:   the core install.
Run:     python examples/03_web_server.py --port 8000
         then open http://127.0.0.1:8000/?prompt=3d+emoji+of+a+red+apple&seed=1
Expect:  the image in the browser. Stop the server with Ctrl-C.

This shows how a pipeline is shared, and is no production server: it has no limit on the number of
waiting requests, no authentication and no TLS, and it listens on this machine alone.
"""

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from hipa_deploy import HipaError, OneStepPipeline
from hipa_deploy.images.png import png_bytes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--port", type=int, default=8000, help="0 takes any free port")
port = parser.parse_args().port

# Any thread may call it: calls at the same time give the same images as calls one after the other.
# It has locks of its own where a backend needs them. More threads make no image sooner.
pipe = OneStepPipeline.load("emoji")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        try:
            prompt = query["prompt"][0]
            seed = int(query.get("seed", ["0"])[0])
            result = pipe(prompt, seed=seed)
        except (KeyError, ValueError):
            self.answer(400, "text/plain", b"expected /?prompt=TEXT&seed=NUMBER\n")
        except HipaError as error:
            # Its message is one line for the user: a prompt that is too long, a seed out of range.
            self.answer(400, "text/plain", f"{error}\n".encode())
        else:
            self.answer(200, "image/png", png_bytes(result.images_BHWC[0], result.parameters[0]))

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


with pipe, ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
    print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
