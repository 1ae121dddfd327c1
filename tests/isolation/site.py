
# What jobs of a whole daemon do besides. What they are told stands in `site.rs`.
import random, ssl

def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET

def connects(address, port):
    with socket.socket(family(address), socket.SOCK_STREAM) as s:
        s.settimeout(60)
        s.connect((address, port))
        return "connected"

def scan(addresses, ports):
    reached, slowest = [], 0
    def reach(to):
        since = time.monotonic()
        try:
            return (to, connects(*to), time.monotonic() - since)
        except OSError as e:
            return (to, type(e).__name__, time.monotonic() - since)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        tried = list(pool.map(reach, [(address, port) for address in addresses for port in ports]))
    for to, answer, seconds in tried:
        if answer == "connected": say("reached", "%s %d" % to)
        slowest = max(slowest, seconds)
    say("tried", len(tried))
    return slowest

# Fifty connections, each cut in the middle of its bytes, while another one downloads.
def aborted():
    count = 0
    with socket.create_connection((OPEN[0], SOURCE), 60) as whole:
        count += len(whole.recv(1000))
        for _ in range(50):
            s = socket.create_connection((OPEN[0], SOURCE), 60)
            s.recv(1000)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.close()
        while True:
            more = whole.recv(65536)
            if not more: break
            count += len(more)
    say("download-beside-50-aborted", "whole" if count == BYTES else count)

def open_job():
    say("devices", " ".join(sorted(os.listdir("/sys/class/net"))))
    for name in ["open.example"] + NOT_TOLD:
        say("name-of-" + name, lookup(name))
    say("by-name", talk(("open.example", OPEN[1])))
    say("closed", attempt(lambda: connects(*CLOSED)))
    aborted()
    say("slowest", "%.1f" % scan(FORBIDDEN + FORBIDDEN_V6, PORTS))
    say("flush", attempt(lambda: delete(None)))
    say("open-after-flush", talk(OPEN))
    say("closed-after-flush", attempt(lambda: connects(*CLOSED)))

def server_name(name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("mirror.example", 443), 60) as s:
            with context.wrap_socket(s, server_hostname=name):
                return "spoken with"
    except OSError as e:
        return type(e).__name__

def question(name):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", random.getrandbits(16), 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)

def ask_raw(messages):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for message in messages:
            try: s.sendto(message, ("192.0.2.1", 53))
            except OSError: pass

def strict_job():
    say("address-of-no-answer", attempt(lambda: connects(*OPEN)))
    say("by-name", talk(("open.example", OPEN[1])))
    say("address-of-an-answer", attempt(lambda: connects(*OPEN)))
    say("port-not-listed", attempt(lambda: connects(OPEN[0], SOURCE)))
    say("name-not-listed", lookup("other.example"))
    say("server-name-listed", server_name("mirror.example"))
    say("server-name-not-listed", server_name("pypi.example"))
    # Its first answer is a public address, those after it one of the host's that nobody lists.
    first = lookup("www.rebind.example")
    changed, since = first, time.monotonic()
    while changed == first and time.monotonic() - since < 60:
        time.sleep(0.5)
        changed = lookup("www.rebind.example")
    say("rebound", "%s, then %s" % (first, changed))
    say("reached-by-rebinding", attempt(lambda: connects("www.rebind.example", PORTS[0])))
    # One port of the host's is allowed: who looks finds it.
    scan([HOST], range(20000, 20020))
    rng = random.Random(7)
    names = [question("f%d.flood.example" % n) for n in range(2000)]
    ask_raw(names)
    ask_raw(bytes(rng.getrandbits(8) for _ in range(rng.randrange(1, 600))) for _ in range(1000))
    ask_raw(bytes(b ^ (1 << rng.randrange(8)) if rng.random() < 0.05 else b for b in m)[:rng.randrange(1, 60)] for m in names[:1000])
    try:
        with socket.create_connection(("192.0.2.1", 53), 20) as s:
            s.sendall(b"\xff\xff" + bytes(rng.getrandbits(8) for _ in range(3000)))
    except OSError: pass
    since, name = time.monotonic(), "no such name"
    while name == "no such name" and time.monotonic() - since < 60:
        name = lookup("open.example")
    say("name-after-floods", name)
    def one(n):
        try: return connects(*OPEN)
        except OSError as e: return type(e).__name__
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        many = list(pool.map(one, range(10000)))
    say("ten-thousand", ", ".join("%d %s" % (many.count(what), what) for what in sorted(set(many))))
    say("by-name-after-all", talk(("open.example", OPEN[1])))
