"""Somebody else's chat server, on a port of this machine."""

import collections
import http.server
import json
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Answers chats: `answers(text, number of the request)` gives a text, (status, body), or
    seconds to wait."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.lock = answers, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def texts(self) -> collections.Counter:
        return collections.Counter(one["messages"][-1]["content"] for one in self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(body)
            number = len(self.server.asked)
        answer = self.server.answers(body["messages"][-1]["content"], number)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = "late"
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = 200, json.dumps({"choices": [choice]})
        status, content = answer
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *about):
        pass
