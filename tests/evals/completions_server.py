"""Somebody else's server of completions, on a port of this machine."""

import http.server
import json
import threading
import time

YES = {"choices": [{"index": 0, "text": " yes", "finish_reason": "stop"}]}


class Server(http.server.ThreadingHTTPServer):
    """Says " yes" to everything; or, from request `good` on, `answer`: a status and what is sent
    with it, or seconds to wait."""

    daemon_threads = True

    def __init__(self, answer=None, *, good: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.good, self.asked = answer, good, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Says nothing of a client that did not wait."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self._say(200, {"data": [{"id": "m", "max_model_len": 100}]})

    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        answer = self.server.answer
        if answer is None or len(self.server.asked) <= self.server.good:
            answer = (200, YES)
        elif isinstance(answer, float):
            time.sleep(answer)
            answer = (200, YES)
        self._say(*answer)

    def _say(self, status, body):
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about):
        pass
