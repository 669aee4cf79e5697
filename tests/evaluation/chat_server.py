"""A real HTTP server that answers as a chat endpoint does, and fails as one does."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dense_rlhf.config.params import JudgeParams

KEY = "sk-ours-and-nobody-elses-0123456789"
QUICK = JudgeParams(wait=0.02, timeout=10.0, concurrency=1, attempts=3)


def completion(text, ended="stop", **more):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": ended}
    usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage} | more
    ).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server = self.server
        with server.lock:
            request = {
                "path": self.path,
                "authorization": self.headers["Authorization"],
                "cookie": self.headers["Cookie"],
            }
            server.asked.append((json.loads(body) if body else {}) | request)
            answer = server.script.pop(0) if server.script else server.usual
            server.at_once, server.most = server.at_once + 1, max(server.most, server.at_once + 1)
        try:
            answer(self)
        except OSError:  # who asked has gone
            self.close_connection = True
        finally:
            with server.lock:
                server.at_once -= 1

    do_GET = do_POST  # what a redirect can lead to

    def log_message(self, *_):
        pass


def say(text="Because. [[A]]", ended="stop", seconds=0.0, **more):
    def answer(handler):
        time.sleep(seconds)
        send(handler, 200, completion(text, ended, **more))

    return answer


def send(handler, status, body, kind="application/json", **headers):
    handler.send_response(status)
    for name, value in ({"Content-Type": kind, "Content-Length": len(body)} | headers).items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def refuse(status, text="bad key", **headers):
    """An error as servers report it, with the caller's key in its text."""

    def answer(handler):
        body = f"{text} {handler.headers['Authorization']}"
        send(handler, status, json.dumps({"error": {"message": body}}).encode(), **headers)

    return answer


def raw(body, kind="application/json", status=200, **headers):
    return lambda handler: send(handler, status, body, kind, **headers)


def silent(handler):
    """Never answers: holds the connection until the test ends."""
    handler.server.over.wait(20)
    handler.close_connection = True


def drop(handler):
    """Closes the connection without a word."""
    handler.close_connection = True


def cut(handler):
    """Promises more than it sends."""
    body = completion("[[A]]")
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def drip(handler):
    """Sends a space now and then, so that no read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"1\r\n \r\n")
        handler.wfile.flush()


def endless(status=200, part=b" " * 2**16):
    """Sends such parts for as long as anybody reads."""

    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.close_connection = True
        while not handler.server.over.is_set():
            handler.wfile.write(part)
            handler.server.sent += len(part)

    return answer


@contextmanager
def chat_server():
    """A server on a free port; `script` are its next answers, `usual` those after, `asked` all that it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.lock, server.over = True, threading.Lock(), threading.Event()
    server.script, server.usual, server.asked, server.at_once, server.most, server.sent = [], say(), [], 0, 0, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
