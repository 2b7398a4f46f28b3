"""A loopback endpoint with moods, in OpenAI's form. Not a test; imported by those that ask one."""

import http.server
import json
import threading


class Raw(bytes):
    """Sent as it is, in place of a whole HTTP answer; then the connection is closed."""


SILENCE = object()  # no answer until the server goes away


class Server:
    """Answers each request with the next of `answers` (the last one again and again); keeps what was asked.

    An answer is a text, a status with headers, the bytes of a body, Raw bytes, SILENCE, or a function of the
    request's body that gives one of these.
    """

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.closing = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append((self.path, body))
                    answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                answer = answer(body) if callable(answer) else answer
                status, headers, payload = 200, {}, b""
                if answer is SILENCE:
                    server.closing.wait()
                    return
                if isinstance(answer, Raw):
                    self.wfile.write(answer)
                    return
                if isinstance(answer, tuple):
                    status, headers = answer
                elif isinstance(answer, bytes):
                    payload = answer
                else:
                    choice = {"message": {"content": answer}, "text": answer}
                    payload = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments):
                pass

        lock = threading.Lock()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


def prefers_long(body):
    """A judge with a mind of its own: the longer text wins, wherever it stands."""
    prompt = body["messages"][0]["content"]
    first, rest = prompt.split("Text 1:\n")[1].split("\n\nText 2:\n")
    second = rest.split("\n\nWhich text")[0]
    return "1" if len(first) > len(second) else "2" if len(second) > len(first) else "tie"
