# Many requests in flight on one connection, answered in any order; writes on one connection are read on another after
# they were answered, and a flush on one covers the other's (multi-conn).
import random
random.seed(1)
other = nbd.NBD()
h.connect_uri(uri)
other.connect_uri(uri)
assert h.can_multi_conn()
content = {}
cookies = []
for i in range(256):
    block = i * 13 % 4096
    data = bytes([i % 251 + 1]) * 4096
    content[block] = data
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), block * 4096))
while any(not h.aio_command_completed(c) for c in cookies if c) and h.aio_in_flight() > 0:
    h.poll(-1)
while h.aio_in_flight() > 0:
    h.poll(-1)
other.flush()
for block, data in content.items():
    assert other.pread(4096, block * 4096) == data
buffers = {b: nbd.Buffer(4096) for b in content}
for b in buffers:
    other.aio_pread(buffers[b], b * 4096)
while other.aio_in_flight() > 0:
    other.poll(-1)
for b, buf in buffers.items():
    assert buf.to_bytearray() == content[b]
other.shutdown()
h.shutdown()
