# What a job does in a machine without a network card. Prints a line for each thing; the test knows what it must say.
import concurrent.futures, os, resource, socket, struct, subprocess, sys, time

def say(what, text):
    print("isolation: %s %s" % (what, text), flush=True)

def talk(to):
    try:
        with socket.create_connection(to, 60) as s:
            greeting = s.recv(5)
            s.sendall(b"hello")
            s.shutdown(socket.SHUT_WR)
            back = b""
            while True:
                more = s.recv(100)
                if not more: break
                back += more
            return "connected %s" % back.decode() if greeting == b"open\n" else "greeted by %r" % greeting
    except OSError as e:
        return type(e).__name__

def attempt(what):
    try:
        return what()
    except OSError as e:
        return type(e).__name__

def send(kind, protocol, to, data):
    with socket.socket(socket.AF_INET, kind, protocol) as s:
        s.settimeout(20)
        s.sendto(data, to)
        s.recv(100)
        return "sent"

def lookup(name):
    try:
        return socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror:
        return "no such name"

# nfnetlink: the whole packet filter, or our table of it, is to be deleted. The answer to the batch's middle message.
def delete(table):
    attributes = b""
    if table:
        name = table.encode() + b"\0"
        attributes = struct.pack("=HH", 4 + len(name), 1) + name + b"\0" * (-len(name) % 4)
    def message(kind, flags, body):
        return struct.pack("=IHHII", 16 + len(body), kind, flags, 7, 0) + body
    edge = struct.pack(">BBH", 0, 0, 10)
    family = 2 if table else 0
    batch = message(0x10, 1, edge) + message(0x0a02, 5, struct.pack(">BBH", family, 0, 0) + attributes) + message(0x11, 1, edge)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as s:
        s.bind((0, 0))
        s.settimeout(20)
        s.send(batch)
        errno = -struct.unpack_from("=i", s.recv(4096), 16)[0]
        if errno: raise OSError(errno, os.strerror(errno))
        return "0"

def basic():
    say("devices", " ".join(sorted(os.listdir("/sys/class/net"))))
    say("files", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    say("open", talk(OPEN))
    refused = []
    def timed(what):
        since = time.monotonic()
        answer = attempt(what)
        refused.append((time.monotonic() - since) * 1000)
        return answer
    say("closed", timed(lambda: socket.create_connection(CLOSED, 60) and "connected"))
    say("udp", timed(lambda: send(socket.SOCK_DGRAM, 0, (OPEN[0], 443), b"q")))
    echo = struct.pack(">BBHHH", 8, 0, 0xf7fe, 0, 1)
    say("ping", timed(lambda: send(socket.SOCK_RAW, socket.IPPROTO_ICMP, (OPEN[0], 0), echo)))
    say("refused-after-ms", "%.0f" % max(refused))
    say("name", lookup("open.example"))
    say("unknown", lookup("nobody.example"))
    say("by-name", talk(("open.example", OPEN[1])))
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        many = list(pool.map(lambda n: talk(CLOSED if n % 2 else OPEN).split(" ")[0], range(200)))
    say("many", ", ".join("%d %s" % (many.count(what), what) for what in sorted(set(many), key=str.lower, reverse=False)))
    with socket.create_connection((OPEN[0], SOURCE), 60) as s:
        count = 0
        while True:
            more = s.recv(65536)
            if not more: break
            count += len(more)
    say("download", count)
    say("download-wanted", BYTES)
    with socket.create_connection((OPEN[0], SINK), 60) as s:
        s.sendall(b"u" * BYTES)
        s.shutdown(socket.SHUT_WR)
        say("upload", s.recv(100).decode())
    say("upload-wanted", BYTES)
    def cut():
        with socket.create_connection((OPEN[0], CUT), 60) as s:
            while s.recv(100): pass
            return "an end"
    say("cut", attempt(cut))
    tried = 0
    def reach(to):
        try:
            socket.create_connection(to, 60).close()
            say("reached-host", to)
        except OSError:
            pass
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        all = [(address, port) for address in FORBIDDEN for port in PORTS]
        list(pool.map(reach, all))
        tried = len(all)
    say("host-ports-tried", tried)
    say("private-name", talk(("private.example", PORTS[0])))
    say("flush", attempt(lambda: delete(None)))
    say("delete", attempt(lambda: delete("dayfly")))
    say("open-after-flush", talk(OPEN))
    say("closed-after-flush", attempt(lambda: socket.create_connection(CLOSED, 60) and "connected"))

def restart():
    s = socket.create_connection(OPEN, 60)
    s.recv(5)
    say("bound", "")
    say("cut", attempt(lambda: "an end" if not s.recv(1) else "bytes"))
    say("again", talk(OPEN))
    say("name", lookup("open.example"))
