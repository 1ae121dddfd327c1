# The job's client: a new connection for each request, HTTP/1.1, as a runner's.
import socket, time

RELAY = ("192.0.2.1", 80)
BLOCK = bytes(1 << 20)


def ask(method, path, length=0, body=None):
    """Sends a request; the socket, with the answer's head read, and what was read behind it."""
    s = socket.create_connection(RELAY)
    s.sendall(f"{method} /bench/{path} HTTP/1.1\r\nHost: gitlab\r\nContent-Length: {length}\r\n\r\n".encode())
    if body is not None:
        s.sendall(body)
    while length and body is None:
        length -= s.send(BLOCK[:length])
    read = b""
    while b"\r\n\r\n" not in read:
        more = s.recv(65536)
        if not more:
            raise SystemExit("the answer has no end")
        read += more
    head, _, rest = read.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(head)
    return s, rest


def text(method, path, body=b""):
    s, rest = ask(method, path, len(body), body)
    while True:
        more = s.recv(65536)
        if not more:
            return rest.decode()
        rest += more


def down(count):
    s, rest = ask("GET", f"down/{count}")
    left, into = count - len(rest), bytearray(1 << 18)
    while left > 0:
        n = s.recv_into(into)
        if n == 0:
            raise SystemExit(f"{left} bytes are missing")
        left -= n


def once(what, count):
    if what == "down":
        down(count)
    elif what == "up":
        ask("POST", "up", count)
    else:
        text("GET", "small")


while True:
    what, times, count = text("GET", "next").split()
    if what == "end":
        break
    took = []
    for _ in range(int(times)):
        since = time.perf_counter()
        once(what, int(count))
        took.append(time.perf_counter() - since)
    text("POST", "took", " ".join(map(str, took)).encode())
